"""A faulty model folder is refused with a message of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.models.folder import ModelError
from tests.support.small_models import make_folder
from worker.models.load import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all files, but without a real model."""
    return make_folder(tmp_path / "broken-model")


def test_an_incomplete_folder_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_model(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "no-such-architecture"}])
def test_an_error_of_mlx_lm_becomes_one_line(folder: Path, config: dict[str, str]) -> None:
    pytest.importorskip("mlx_lm")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded: ") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
