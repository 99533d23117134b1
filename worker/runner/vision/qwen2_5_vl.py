"""Qwen2.5-VL (and UI-TARS): mlx-vlm's model, with M-RoPE positions per row and an encoder that runs block by block.

It does not use mlx-vlm's `BatchGenerator`, which takes the sampling options of a batch from its first request, admits
rows only when a whole group of slots is free, and computes log-probabilities for every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_vlm import utils
from mlx_vlm.models.base import load_chat_template
from mlx_vlm.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

from worker.models.load import NO_CODE, LoadedModel, loaded_as
from worker.runner.vision.images import ImageMedia, PlacedImage, expand
from worker.runner.vision.mrope import MRopeModel
from worker.runner.vision.qwen_encoder import QwenEncoder


class Qwen25VL:
    """See `worker.runner.vision.family.VisionFamily`."""

    def __init__(self, encoder: QwenEncoder, image_token: int) -> None:
        self.encoder = encoder
        self.image_token = image_token

    def expand(self, tokens: Sequence[int], images: Sequence[PlacedImage]) -> tuple[list[int], ImageMedia]:
        """See `VisionFamily.expand`."""
        return expand(tokens, self.image_token, images)


def load(folder: Path, config: dict[str, Any], *, lazy: bool) -> tuple[LoadedModel, Qwen25VL]:
    """Load a model folder of this family; see `worker.runner.vision.load`.

    Args:
        config: content of config.json.

    Raises:
        Exception: the folder is broken. The libraries raise any type of exception.
    """
    model: Any = utils.load_model(folder, lazy=lazy)
    tokenizer = tokenizer_utils.load(folder, NO_CODE, eos_token_ids=config.get("eos_token_id"))
    load_chat_template(tokenizer, folder)  # type: ignore[no-untyped-call]
    processor = Qwen2_5_VLProcessor.from_pretrained(str(folder), **NO_CODE)  # type: ignore[no-untyped-call]
    encoder = QwenEncoder(model.vision_tower, processor.image_processor)
    language = MRopeModel(model.language_model, int(model.config.image_token_id), encoder.encode)
    loaded = loaded_as("vision", folder, language, tokenizer, config)
    loaded = replace(loaded, card=replace(loaded.card, image=asdict(encoder.geometry)))
    return loaded, Qwen25VL(encoder, language.image_token)
