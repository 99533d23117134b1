"""Which model `scripts/serve` serves, told before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.commands import serve
from scripts.commands.stack import config, preflight
from scripts.commands.stack.failure import StartFailed
from scripts.commands.stack.model import VISION, choose_vision, ensure_model
from shared.settings import Settings


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
