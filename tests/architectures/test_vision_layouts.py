"""Vision models load from folders in the layouts in which they are published, with the same weights as a converted one.

mlx-vlm shows that a layout is right: it must read the same weights from both folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.utils import load_model as load_with_mlx_vlm

from tests.architectures.vision_layouts import FP8, LAYOUTS, publish
from tests.architectures.vision_models import build
from worker.models.load import load_model
from worker.runner.vision.load import load_vision_model

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

FAST = ("idefics3", "gemma3")
NOT_TEXT = {("pixtral", 1), ("mistral3", 2), ("ministral3", 2), ("glm_ocr", 0)}
"""Layouts that are not read as text: mlx-lm does not know their names, or config.json does not state a draft layer."""
STATE_TYING = ("glm_ocr", "internvl", "qwen2_5_vl")
"""For these, mlx-vlm needs `tie_word_embeddings`, or assumes true."""


def assert_same(found: Any, expected: Any) -> None:
    weights, others = dict(tree_flatten(found)), dict(tree_flatten(expected))
    redundant = {path for path in others.keys() - weights.keys() if path.endswith("lm_head.weight")}
    assert weights.keys() == others.keys() - redundant  # a converted Gemma 3 has its embedding twice
    assert [path for path, array in weights.items() if not mx.allclose(array, others[path], rtol=0, atol=1e-6)] == []


def check_layouts(name: str, tmp_path: Path) -> None:
    converted = build(name, tmp_path / "converted")
    language, half = load_vision_model(converted)
    text, reference = load_model(converted).model.parameters(), load_with_mlx_vlm(converted).parameters()
    for number, changes in enumerate(LAYOUTS[name]):
        folder = publish(converted, tmp_path / f"layout-{number}", changes)
        assert_same(load_with_mlx_vlm(folder).parameters(), reference)
        found, found_half = load_vision_model(folder)
        assert_same(found.model.parameters(), language.model.parameters())
        assert_same(found_half.encoder.tower.parameters(), half.encoder.tower.parameters())
        if (name, number) not in NOT_TEXT:
            assert_same(load_model(folder).model.parameters(), text)
    if name not in STATE_TYING:
        leave_out(converted, "tie_word_embeddings")
        assert_same(load_vision_model(converted)[0].model.parameters(), language.model.parameters())


def leave_out(folder: Path, field: str) -> None:
    """Remove a field from all sections of config.json, as folders do that state only what differs from a default."""
    config = json.loads((folder / "config.json").read_text())
    for section in (config, *(each for each in config.values() if isinstance(each, dict))):
        section.pop(field, None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", FAST)
def test_a_vision_model_loads_as_it_is_published(name: str, tmp_path: Path) -> None:
    check_layouts(name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in FAST])
def test_any_vision_model_loads_as_it_is_published(name: str, tmp_path: Path) -> None:
    check_layouts(name, tmp_path)


@pytest.mark.parametrize("name", FP8)
def test_an_fp8_checkpoint_gives_the_logits_of_mlx_vlm(name: str, tmp_path: Path) -> None:
    changes, quantisation = FP8[name]
    folder = publish(build(name, tmp_path / "converted"), tmp_path / "published", changes, quantisation)
    tokens = mx.array([[5, 6, 7, 30, 40]])
    language = load_vision_model(folder)[0].model
    expected = load_with_mlx_vlm(folder).language_model(tokens).logits
    assert mx.allclose(language(tokens, language.make_cache()), expected, atol=1e-4)
