"""DeepSeek-OCR: an image as a whole, and a large one also as a grid of crops; each is a view of the encoder.

mlx-vlm's own `get_input_embeddings` reads one image per prompt and leaves out images whose pixels add up to zero, and
its processor cuts the last token of a prompt. Only its encoders, projector and way to crop are used here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isqrt
from typing import Any, ClassVar, Final, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_vlm.models.deepseekocr import processing_deepseekocr as processing
from PIL import Image, ImageOps

from worker.runner.vision.generic_encoder import PATCH_VALUES, GenericEncoder, Inputs, TokenLayout

Crops: TypeAlias = tuple[int, int]
"""Columns and rows of crops; (0, 0) for an image that is not cropped."""

_SIDE: Final = 1024
"""Side length of the view of the whole image, in pixels."""
_TOKEN: Final = 64
"""Side length of the part of a view that becomes a token, in pixels."""
_MIN_CROPS: Final = 2
_LAYER: Final = re.compile(r"sam_model\.blocks\.\d+|vision_model\.(transformer|qwen2_encoder)\.layers\.\d+")
"""Names of the layers of the two encoders."""


class DeepseekOCREncoder(GenericEncoder):
    """See `GenericEncoder`.

    Attributes:
        crop_side: side length of a crop in pixels; an image that is not larger is not cropped.
        max_crops: maximum number of crops.
    """

    warm_sides = (512, 1000)
    crop_side: ClassVar[int] = 640
    max_crops: ClassVar[int] = 9

    def _read(self, image: Image.Image) -> tuple[tuple[int, ...], Inputs]:
        views, crops = [], (0, 0)
        if max(image.size) > self.crop_side:
            views, crops = processing.dynamic_preprocess(  # type: ignore[no-untyped-call]
                image, _MIN_CROPS, self.max_crops, self.crop_side
            )
        border = tuple(int(255 * mean) for mean in self._processor.image_transform.mean)
        whole = ImageOps.pad(image, (_SIDE, _SIDE), color=border)
        tokens = self._tokens(crops, self.crop_side // _TOKEN) + self._tokens((1, 1), _SIDE // _TOKEN) + 1
        pixels = {"pixel_values": [self._normalised(view) for view in (*views, whole)], "crops": crops}
        return (self._processor.image_token_id,) * tokens, pixels

    def _tokens(self, grid: Crops, side: int) -> int:
        """Return the number of tokens of a grid of views, each with `side` tokens per side."""
        columns, rows = grid
        return rows * side * (columns * side + 1)

    def _normalised(self, view: Image.Image) -> Any:
        """Return the pixels [1, height, width, channels] of a view."""
        settings = self._processor.image_transform
        mean, std = (np.array(each, np.float32) for each in (settings.mean, settings.std))
        return ((np.asarray(view) / np.float32(255) - mean) / std)[None]

    def _values(self, pixels: Any) -> mx.array:
        """Return pixels as exact as the model was trained to see them."""
        return mx.array(pixels).astype(mx.bfloat16).astype(self.tower.sam_model.patch_embed.proj.weight.dtype)

    def _paced_layers(self) -> Sequence[Any]:
        return [module for path, module in self.tower.named_modules() if _LAYER.fullmatch(path)]

    def _features(self, pixels: Inputs, _layout: TokenLayout) -> mx.array:
        *crops, whole = (self._view(view) for view in pixels["pixel_values"])
        parts = [self._packed_views(crops, pixels["crops"])] if crops else []
        parts += [self._packed_views([whole], (1, 1)), self.tower.view_separator[None]]
        return mx.concatenate([part.astype(whole.dtype) for part in parts])[None]

    def _view(self, pixels: Any) -> mx.array:
        """Return the features [tokens, hidden size] of a view."""
        values = self._values(pixels)
        details = self.tower.sam_model(values)
        found = mx.concatenate([self.tower.vision_model(values, details)[:, 1:], details.flatten(1, 2)], axis=-1)
        features: mx.array = self.tower.projector(found)[0]
        return features

    def _packed_views(self, views: Sequence[mx.array], grid: Crops) -> mx.array:
        """Return the features of a grid of views in rows of the image, with a vector at the end of each row."""
        columns, rows = grid
        tokens, hidden = views[0].shape
        side = isqrt(tokens)
        tiles = mx.stack(list(views)).reshape(rows, columns, side, side, hidden).transpose(0, 2, 1, 3, 4)
        in_rows = tiles.reshape(rows * side, columns * side, hidden)
        ends = mx.broadcast_to(self.tower.image_newline.astype(in_rows.dtype), (rows * side, 1, hidden))
        return mx.concatenate([in_rows, ends], axis=1).reshape(-1, hidden)

    def _patch_bytes(self, layout: Any) -> int:
        # Views are encoded one after the other, so the warm-up has measured what one needs. The pixels of all are held
        # as 32-bit numbers and in two converted forms, and the next image's may be there as well.
        return int(5 * layout.patches * PATCH_VALUES * 4)


class DeepseekOCR2Encoder(DeepseekOCREncoder):
    """The encoder of DeepSeek-OCR 2, whose tokens follow an order that it has learnt instead of rows."""

    crop_side = 768
    max_crops = 6

    def _tokens(self, grid: Crops, side: int) -> int:
        columns, rows = grid
        return rows * columns * side**2

    def _view(self, pixels: Any) -> mx.array:
        values = self._values(pixels)
        features: mx.array = self.tower.projector(self.tower.vision_model(values, self.tower.sam_model(values)))[0]
        return features

    def _packed_views(self, views: Sequence[mx.array], _grid: Crops) -> mx.array:
        return mx.concatenate(list(views))
