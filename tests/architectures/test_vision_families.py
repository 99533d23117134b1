"""Every family of vision models against mlx-vlm; by default one or two of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx

from tests.architectures.folders import adapt
from tests.architectures.vision_checks import CHECKS, Subject
from tests.architectures.vision_models import VISION_MODELS, build
from worker.models.load import load_model
from worker.runner.vision.load import load_vision_model

pytestmark = [
    # Processors of models that also hear make filters for sound, which are not used here.
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),
    pytest.mark.filterwarnings("ignore:Image.Image.getdata is deprecated:DeprecationWarning"),  # mlx-vlm uses it
]

FAST = ("qwen3_5", "qwen3_vl", "mistral3", "gemma4")


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Return the model of a family; it is built once."""
    return cache(lambda name: Subject(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", FAST)
def test_vision_family_batched(name: str, subject_of: Callable[[str], Subject]) -> None:
    subject = subject_of(name)
    loaded, _ = subject._loaded
    assert loaded.card.token_rule is not None, "the API can count the tokens of images"
    CHECKS["batched"](subject)


def test_an_adapter_applies_to_the_language_model_of_a_vision_model(tmp_path: Path) -> None:
    folder, ids = build("qwen3_5", tmp_path / "model"), mx.array([[5, 6, 7, 30, 40]])
    expected = adapt(load_model(folder).model, tmp_path / "adapter")(ids)
    plain, tuned = (load_vision_model(folder, adapter=each)[0].model for each in (None, tmp_path / "adapter"))
    assert mx.allclose(tuned(ids, tuned.make_cache()), expected, atol=1e-4)
    assert not mx.allclose(plain(ids, plain.make_cache()), expected, atol=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", VISION_MODELS)
def test_any_vision_family(name: str, check: str, subject_of: Callable[[str], Subject]) -> None:
    CHECKS[check](subject_of(name))
