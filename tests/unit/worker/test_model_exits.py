"""Model folders that make a library call `sys.exit` or panic are refused, and the process continues."""

from __future__ import annotations

import json
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import mlx_lm.models
import pytest

from shared.models.folder import ModelError
from shared.settings import ROOT
from worker.models.load import contained, load_model, never_exits, tokenizer_defaults
from worker.runner.vision.load import load_vision_model

IMPORTS = """
import importlib, sys, mlx.core
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit:
        print("exits", name)
    except Exception:
        pass
"""


def copy_as(folder: Path, model_type: str, target: Path) -> Path:
    """Copy a model folder with another model type."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": model_type, "architectures": None}))
    return target


def exiting_architectures() -> list[str]:
    """Return the architectures of mlx-lm that call `sys.exit` on import."""
    names = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    result = subprocess.run([sys.executable, "-c", IMPORTS, *names], capture_output=True, check=True, text=True)
    return [line.removeprefix("exits ") for line in result.stdout.splitlines() if line.startswith("exits ")]


def test_every_architecture_that_exits_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    names = exiting_architectures()
    assert "olmo" in names
    for name in names:
        folder = copy_as(tiny_model_path, name, tmp_path / name)
        with pytest.raises(ModelError, match=r"cannot be loaded: its library would end the process \(exit status 1\)"):
            load_model(folder)
        with pytest.raises(ModelError):
            tokenizer_defaults(folder)


class Panic(BaseException):
    """Like a panic of the tokenizer library, which is not an `Exception`."""


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit("bye"), Panic("index out of bounds")])
@pytest.mark.parametrize("where", ["mlx_lm.utils.load_tokenizer", "mlx_lm.utils.load_model"])
def test_loading_a_text_model_survives_exits_and_panics(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    _raise_in(monkeypatch, where, error)
    with pytest.raises(ModelError):
        load_model(tiny_model_path)


@pytest.mark.parametrize(
    "where", ["mlx_vlm.utils.load_config", "mlx_vlm.utils.load_model", "worker.models.text_half.load"]
)
def test_loading_a_vision_model_survives_exits(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    _raise_in(monkeypatch, where, SystemExit(1))
    with pytest.raises(ModelError, match="would end the process"):
        load_vision_model(ROOT / "models/ui-micro")


def _raise_in(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def raises(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(where, raises)


def test_every_step_of_loading_and_warm_up_survives_exits(tmp_path: Path) -> None:
    def at_once() -> NoReturn:
        raise SystemExit(2)

    def later() -> Generator[float, None, str]:
        yield 0.5
        raise Panic("later")

    with pytest.raises(ModelError, match="exit status 2"):
        list(never_exits(at_once, tmp_path))
    steps = never_exits(later, tmp_path)
    assert next(steps) == 0.5
    with pytest.raises(ModelError, match="later"):
        next(steps)
    stopped = never_exits(later, tmp_path)
    next(stopped)
    stopped.close()
    done = never_exits(lambda: "model", tmp_path)
    with pytest.raises(StopIteration) as caught:
        next(done)
    assert caught.value.value == "model"


def test_other_errors_and_ctrl_c_are_raised_unchanged(tmp_path: Path) -> None:
    def fails() -> NoReturn:
        raise MemoryError

    with pytest.raises(MemoryError):
        list(never_exits(fails, tmp_path))
    with pytest.raises(KeyboardInterrupt), contained("x"):
        raise KeyboardInterrupt
    with pytest.raises(ModelError, match="original"), contained("x"):
        raise ModelError("original")
