"""The rules by which the API counts the tokens of images, against the processors of mlx-vlm, without any weights."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")

from mlx import nn
from mlx_vlm import utils

from shared.models.image_tokens import from_record, image_tokens, to_record
from tests.architectures.vision_models import VISION_MODELS, write_settings
from worker.models.load import NO_CODE
from worker.runner.vision.families import FAMILIES, Parts
from worker.runner.vision.half import Encoder
from worker.runner.vision.load import _placeholder
from worker.runner.vision.token_rules import proven_rule, unknown

pytestmark = [
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),
    pytest.mark.filterwarnings("ignore:Image.Image.getdata is deprecated:DeprecationWarning"),  # mlx-vlm uses it
]

VARIANTS = {"ministral3": "mistral3", "gemma4_e": "gemma4"}
RULED = [name for name in VISION_MODELS if FAMILIES[VARIANTS.get(name, name)].tokens is not unknown]
SAME = ("ministral3", "smolvlm", "gemma4_e", "glm4v_moe", "internvl_chat", "deepseekocr")
"""Their processors compute sizes like those of other models in the list."""
SIZES = ((3, 3), (28, 28), (60, 50), (224, 224), (1, 150), (180, 3), (640, 90), (77, 1000), (17, 2900), (2000, 11))
LARGE = ((1280, 720), (999, 1333), (2000, 3000), (3000, 2000))
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "internvl": {"size": 448, "dynamic_max_num": 12},
    "idefics3": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    "smolvlm": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    "gemma4": {"max_soft_tokens": 280},
    "nemotron_h_nano_omni": {"min_num_patches": 1024, "max_num_patches": 13312},
    "kimi_vl": {"pad_input": True},
    "granite4_vision": {"image_grid_pinpoints": [[128 * rows, 128 * (8 // rows)] for rows in range(1, 9)]},
}
"""Settings of real models where those of the tiny ones are smaller, and others that real ones may have."""


def encoder_of(name: str, folder: Path) -> tuple[Any, Encoder]:
    """Return the processor of a model, and its encoder without weights, which runs the processor."""
    config = write_settings(name, folder)
    family = FAMILIES[config["model_type"]]
    importlib.import_module(f"mlx_vlm.models.{config['model_type']}")  # installs the processor
    processor: Any = utils.load_processor(folder, add_detokenizer=False, **NO_CODE)
    model, language = nn.Module(), SimpleNamespace(embed=None, args=SimpleNamespace(embedding_multiplier=1.0))
    model.config = SimpleNamespace(**config)
    token = _placeholder(family, config, processor.tokenizer)
    parts = Parts(folder, config, None, model, processor, processor.tokenizer, token)
    return processor, family.encoder(parts, language)  # type: ignore[arg-type]


def check(name: str, processor: Any, encoder: Encoder, sizes: Iterable[tuple[int, int]]) -> None:
    rule = proven_rule(FAMILIES[VARIANTS.get(name, name)].tokens, processor, encoder.layout)
    assert rule is not None
    published = from_record(json.loads(json.dumps(to_record(rule))))
    assert published is not None
    for size in sizes:
        by_processor = tokens_or_none(lambda *size: encoder.layout(*size).tokens, size)
        assert tokens_or_none(lambda *size: image_tokens(published, *size), size) == by_processor, size


def tokens_or_none(count: Callable[[int, int], int], size: tuple[int, int]) -> int | None:
    try:
        return count(*size)
    except ValueError:
        return None


@pytest.mark.parametrize("name", [name for name in RULED if name not in SAME])
def test_the_api_counts_the_tokens_of_images_like_the_processor(name: str, tmp_path: Path) -> None:
    check(name, *encoder_of(name, tmp_path / name), SIZES)


@pytest.mark.long
@pytest.mark.parametrize("name", RULED)
def test_the_api_counts_the_tokens_of_many_images_like_the_processor(name: str, tmp_path: Path) -> None:
    processor, encoder = encoder_of(name, tmp_path / name)
    draw = random.Random(name)
    sides = [round(2 ** draw.uniform(1, 10)) for _ in range(120)]
    check(name, processor, encoder, [*SIZES, *LARGE, *zip(sides[::2], sides[1::2], strict=True)])
    if name in AS_PUBLISHED:
        for setting, value in AS_PUBLISHED[name].items():
            setattr(processor.image_processor, setting, value)
        encoder.layout = encoder._compute_layout  # type: ignore[method-assign, attr-defined] # without the cache
        check(name, processor, encoder, [*SIZES, *LARGE, *zip(sides[::4], sides[1::4], strict=True)])


def test_a_rule_that_fails_or_that_the_processor_contradicts_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor, encoder = encoder_of("gemma3", tmp_path / "gemma3")
    assert proven_rule(itemgetter("size"), {}, encoder.layout) is None
    processor.image_seq_length += 1  # the processor has made its text already
    assert proven_rule(FAMILIES["gemma3"].tokens, processor, encoder.layout) is None
    del processor.image_seq_length
    assert proven_rule(FAMILIES["gemma3"].tokens, processor, encoder.layout) is None
    assert caplog.messages == ["image_token_rule_not_used"] * 3
