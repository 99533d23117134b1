"""Every family of vision models against mlx-vlm; by default one or two of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm")

from tests.architectures.vision_checks import CHECKS, Subject
from tests.architectures.vision_models import VISION_MODELS

# Processors of models that also hear make filters for sound, which are not used here.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

FAST = ("qwen3_5", "qwen3_vl", "mistral3", "gemma4")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {}


def _subject(name: str, subjects: dict[str, Subject], folder: Path) -> Subject:
    if name not in subjects:
        subjects[name] = Subject(name, folder)
    return subjects[name]


@pytest.mark.parametrize("name", FAST)
def test_vision_family_batched(name: str, subjects: dict[str, Subject], tmp_path: Path) -> None:
    CHECKS["batched"](_subject(name, subjects, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", VISION_MODELS)
def test_any_vision_family(name: str, check: str, subjects: dict[str, Subject], tmp_path: Path) -> None:
    CHECKS[check](_subject(name, subjects, tmp_path))
