"""A model folder with something wrong in it is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from worker.models import ModelError, check_folder, load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model, with weights and a tokenizer that are neither."""
    folder = tmp_path / "broken-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    (folder / "model.safetensors").write_bytes(b"not weights")
    (folder / "tokenizer.json").write_text("{")
    return folder


def test_a_whole_folder_passes(folder: Path) -> None:
    check_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "it has no config.json"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "names no model_type"),
        ("config.json", "{}", "names no model_type"),
        ("model.safetensors", None, "has no weights"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
def test_what_is_missing_is_named(folder: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "no-such-architecture"}])
def test_what_mlx_lm_refuses_is_one_line(folder: Path, config: dict[str, str]) -> None:
    pytest.importorskip("mlx_lm")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded: ") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
