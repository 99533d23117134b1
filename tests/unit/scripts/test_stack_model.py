"""Which model `scripts/serve` serves, told before anything is started."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from scripts.stack import config, preflight, serve
from scripts.stack.failure import StartFailed
from scripts.stack.model import VISION, choose_vision, ensure_model
from scripts.stack.screen import Screen
from shared.settings import ROOT, Settings
from tests.support.small_models import make_folder


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's settings; what is put into the environment goes again."""
    monkeypatch.setitem(Settings.model_config, "env_file", tmp_path / "env")
    monkeypatch.setenv("MODEL_PATH", "")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))


def test_vision_is_the_model_of_this_process_and_of_those_it_starts(tmp_path: Path) -> None:
    settings = choose_vision(preflight.settings_or_fail())

    assert settings.model_path == VISION
    assert settings.model_id == "ui-micro"
    assert config.child_environment(settings, "mark", tmp_path / "env")["MODEL_PATH"] == str(VISION)
    assert preflight.settings_or_fail().model_path == VISION  # they are read again when .env has been written


def test_vision_and_the_same_model_path_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", "models/ui-micro")

    assert choose_vision(preflight.settings_or_fail()).model_path == VISION


@pytest.mark.parametrize("path", ["models/another", "models/SmolLM2-135M-Instruct"])
def test_vision_and_another_model_path_do_not(path: str, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(f"MODEL_PATH={path}\n")

    with pytest.raises(StartFailed, match=rf"--vision serves .*/models/ui-micro, but MODEL_PATH is .*{path}; leave"):
        choose_vision(preflight.settings_or_fail())
    assert not os.environ["MODEL_PATH"]


def test_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODEL_PATH", "models/another")

    assert serve.main(["--vision"]) == 1
    assert "--vision serves" in capsys.readouterr().err


def test_an_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve.main(["--visoin"])
    assert "unrecognized arguments: --visoin" in capsys.readouterr().err


def test_a_default_of_the_catalog_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        f'default = "far"\n[models.far]\npath = "{tmp_path}/far"\n[models.near]\npath = "models/ui-micro"\n'
    )
    monkeypatch.setenv("MODELS_FILE", str(catalog))

    with pytest.raises(StartFailed, match=r"catalog.toml: the default model's folder .*/far holds no model"):
        ensure_model(preflight.settings_or_fail(), {}, None)  # type: ignore[arg-type]  # nothing is waited for


def test_the_printed_example_is_one_that_the_small_vision_model_understands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Screen().ready(choose_vision(preflight.settings_or_fail()), tmp_path / "env", key_in_environment=True)
    said = capsys.readouterr().out
    assert "ui-micro is ready" in said
    (line,) = (line for line in said.splitlines() if line.startswith("curl"))
    options = shlex.split(line)
    assert ROOT / options[options.index("-F") + 1].removeprefix("images=@") == ROOT / "docs/images/page.png"
    assert json.loads(options[-1].removeprefix("request="))["prompt"] == "click the red Save button"


def test_the_printed_example_asks_a_model_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("one", "two", "three")
    entries = (f'[models.{name}]\npath = "{make_folder(tmp_path / name)}"\n' for name in names)
    (tmp_path / "catalog.toml").write_text("".join(entries))
    for name, value in (("MODELS_FILE", str(tmp_path / "catalog.toml")), ("WORKER_MODELS", "three;two")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORKERS", "2")
    Screen().ready(preflight.settings_or_fail(), tmp_path / "env", key_in_environment=True)
    said = capsys.readouterr().out
    assert "three, two are ready: 2 workers" in said
    assert '"model": "three"' in said
