"""Fixtures: real models, made once in models/ and shared by every run on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.blas import prefer_openblas
from shared.settings import ROOT

# Before any test module imports MLX: afterwards it is too late, and a real model ten times slower.
prefer_openblas()

from scripts.model_files import default_model  # noqa: E402
from scripts.model_files.make_tiny_model import make_tiny_model  # noqa: E402
from scripts.model_files.shapes import TINY_VISION  # noqa: E402
from scripts.model_files.smollm2 import Dtype  # noqa: E402
from scripts.model_files.staging import locked  # noqa: E402

_MODELS = ROOT / "models"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, in the type that is fastest here."""
    return _made(default_model.NAME, None)


@pytest.fixture(scope="session")
def smollm2_4bit_path() -> Path:
    """SmolLM2-135M-Instruct, packed as it came."""
    return _made(f"{default_model.NAME}-4bit", Dtype.FOUR_BIT)


@pytest.fixture(scope="session")
def tiny_model_path(smollm2_path: Path) -> Path:
    """A tiny llama of random weights with SmolLM2's tokenizer."""
    target = _MODELS / "tiny-random-llama"
    make_tiny_model(target, smollm2_path)
    return target


@pytest.fixture(scope="session")
def tiny_vision_path(smollm2_path: Path) -> Path:
    """A tiny Qwen2.5-VL of random weights with SmolLM2's tokenizer and Qwen2.5-VL's image processor."""
    target = _MODELS / TINY_VISION.folder
    make_tiny_model(target, smollm2_path, TINY_VISION)
    return target


def _made(name: str, dtype: Dtype | None) -> Path:
    target = _MODELS / name
    with locked(_MODELS):
        if not default_model.is_ready(target, dtype):
            default_model.make(target, dtype)
    return target
