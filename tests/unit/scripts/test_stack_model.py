"""The models that `scripts/serve` serves, and its output."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from scripts.stack import config, preflight, serve
from scripts.stack.failure import StartFailed
from scripts.stack.model import add_vision_model, ensure_model
from scripts.stack.terminal import Terminal
from shared.models.catalog import load_catalog
from shared.settings import ROOT, Settings
from tests.support.small_models import make_folder


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore this machine's settings, and restore the environment afterwards."""
    monkeypatch.setitem(Settings.model_config, "env_file", tmp_path / "env")
    monkeypatch.setenv("MODEL_PATH", "")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))


def with_vision() -> Settings:
    settings = preflight.load_settings_or_fail()
    preflight.prepare_data_dir(settings)
    return add_vision_model(settings)


def first_models(settings: Settings) -> list[str]:
    return [model.id for model in load_catalog(settings).first(settings.worker_models, 0)[0]]


@pytest.fixture(autouse=True)
def _vision_changes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODELS_FILE", "WORKER_MODELS"):
        monkeypatch.setenv(name, "")


def test_vision_adds_a_model_and_keeps_the_default_one(tmp_path: Path) -> None:
    settings = with_vision()
    assert load_catalog(settings).default == "SmolLM2-135M-Instruct"
    assert first_models(settings) == ["SmolLM2-135M-Instruct", "ui-micro"]
    environment = config.child_environment(settings, "mark", tmp_path / "env")
    assert environment["WORKER_MODELS"] == "SmolLM2-135M-Instruct,ui-micro"
    assert first_models(preflight.load_settings_or_fail()) == first_models(settings)  # as after `.env` was written


def test_vision_adds_a_model_to_a_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", str(make_folder(tmp_path / "mine")))
    settings = with_vision()
    assert load_catalog(settings).default == "mine"
    assert first_models(settings) == ["mine", "ui-micro"]


def test_vision_adds_a_model_to_a_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (f'[models.{name}]\npath = "{make_folder(tmp_path / name)}"\n' for name in ("one", "two"))
    (tmp_path / "catalog.toml").write_text('default = "two"\n' + "".join(entries))
    monkeypatch.setenv("MODELS_FILE", str(tmp_path / "catalog.toml"))
    settings = with_vision()
    catalog = load_catalog(settings)
    assert (catalog.default, list(catalog.models), catalog.faults) == ("two", ["one", "two", "ui-micro"], ())
    assert first_models(settings) == ["two", "ui-micro"]


def test_vision_uses_the_name_that_the_catalog_gives_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "catalog.toml").write_text('[models.screens]\npath = "models/ui-micro"\n')
    monkeypatch.setenv("MODELS_FILE", str(tmp_path / "catalog.toml"))
    assert first_models(with_vision()) == ["screens"]


def test_an_unknown_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve.main(["--visoin"])
    assert "unrecognized arguments: --visoin" in capsys.readouterr().err


def test_a_missing_default_model_of_the_catalog_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        f'default = "far"\n[models.far]\npath = "{tmp_path}/far"\n[models.near]\npath = "models/ui-micro"\n'
    )
    monkeypatch.setenv("MODELS_FILE", str(catalog))

    with pytest.raises(StartFailed, match=r"catalog.toml: the default model's folder .*/far contains no model"):
        ensure_model(preflight.load_settings_or_fail(), {}, None)  # type: ignore[arg-type]  # nothing is fetched, so it never pauses


def test_the_printed_example_suits_the_small_vision_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().print_ready(with_vision(), tmp_path / "env", key_in_environment=True)
    output = capsys.readouterr().out
    assert "SmolLM2-135M-Instruct, ui-micro are ready" in output
    text, vision = (line for line in output.splitlines() if line.startswith("curl"))
    assert "capital of France" in text
    options = shlex.split(vision)
    assert ROOT / options[options.index("-F") + 1].removeprefix("images=@") == ROOT / "docs/images/page.png"
    assert json.loads(options[-1].removeprefix("request=")) == {
        "model": "ui-micro",
        "prompt": "click the red Save button",
        "temperature": 0,
    }


def test_the_printed_example_uses_a_loaded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("one", "two", "three")
    entries = (f'[models.{name}]\npath = "{make_folder(tmp_path / name)}"\n' for name in names)
    (tmp_path / "catalog.toml").write_text("".join(entries))
    for name, value in (("MODELS_FILE", str(tmp_path / "catalog.toml")), ("WORKER_MODELS", "three;two")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORKERS", "2")
    Terminal().print_ready(preflight.load_settings_or_fail(), tmp_path / "env", key_in_environment=True)
    output = capsys.readouterr().out
    assert "three, two are ready: 2 workers" in output
    assert '"model": "three"' in output
