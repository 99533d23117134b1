"""Fixtures with real models, created once in models/ and shared by all runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.blas import prefer_openblas
from shared.settings import ROOT

# OpenBLAS must be loaded before MLX is imported; without it a real model is ten times slower.
prefer_openblas()

from scripts.model_files import default_model  # noqa: E402
from scripts.model_files.make_tiny_model import make_tiny_model  # noqa: E402
from scripts.model_files.shapes import TINY_VISION  # noqa: E402
from scripts.model_files.smollm2 import Dtype  # noqa: E402
from scripts.model_files.staging import locked  # noqa: E402

_MODELS = ROOT / "models"


@pytest.fixture
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let settings without a DATA_DIR use a temporary one: loading a model writes there."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in the fastest data type for this machine."""
    return _ensure(default_model.NAME, None)


@pytest.fixture(scope="session")
def smollm2_4bit_path() -> Path:
    """SmolLM2-135M-Instruct with its original 4-bit weights."""
    return _ensure(f"{default_model.NAME}-4bit", Dtype.FOUR_BIT)


@pytest.fixture(scope="session")
def tiny_model_path(smollm2_path: Path) -> Path:
    """A tiny llama with random weights and SmolLM2's tokenizer."""
    target = _MODELS / "tiny-random-llama"
    make_tiny_model(target, smollm2_path)
    return target


@pytest.fixture(scope="session")
def tiny_vision_path(smollm2_path: Path) -> Path:
    """A tiny Qwen2.5-VL with random weights, SmolLM2's tokenizer and Qwen2.5-VL's image processor."""
    target = _MODELS / TINY_VISION.folder
    make_tiny_model(target, smollm2_path, TINY_VISION)
    return target


def _ensure(name: str, dtype: Dtype | None) -> Path:
    target = _MODELS / name
    with locked(_MODELS):
        if not default_model.is_ready(target, dtype):
            default_model.make(target, dtype)
    return target
