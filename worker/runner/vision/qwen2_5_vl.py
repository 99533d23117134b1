"""Qwen2.5-VL (and UI-TARS): mlx-vlm's model, with positions of three axes and an encoder that works block by block.

mlx-vlm's own `BatchGenerator` takes the sampling of a batch from its first request, admits only when a whole group of
slots is free, and computes log-probabilities for every row; the runner does none of that.
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
from worker.runner.vision import images
from worker.runner.vision.images import Grid, ImageMedia
from worker.runner.vision.mrope import MRopeModel
from worker.runner.vision.qwen_encoder import QwenEncoder


class Qwen25VL:
    """See `worker.runner.vision.family.VisionFamily`."""

    def __init__(self, encoder: QwenEncoder, image_token: int) -> None:
        self.encoder = encoder
        self.image_token = image_token

    def place(self, tokens: Sequence[int], shown: Sequence[tuple[str, Grid, bytes]]) -> tuple[list[int], ImageMedia]:
        """See `VisionFamily.place`."""
        return images.place(tokens, self.image_token, shown)


def load(folder: Path, config: dict[str, Any], *, lazy: bool) -> tuple[LoadedModel, Qwen25VL]:
    """Load a folder of this family: the language model with its tokenizer, and what is particular to it.

    Raises:
        Exception: something in the folder is broken; the libraries raise anything.
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
