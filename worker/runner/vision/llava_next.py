"""LLaVA-NeXT: an image as a whole, and as a grid of tiles whose features become rows without the padding.

mlx-vlm's own `get_input_embeddings` puts every tile in the place of one image token and cuts the others, so only its
encoder and projector are used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_vlm import utils
from mlx_vlm.models import llava_next
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from worker.runner.vision.generic_encoder import GenericEncoder, Inputs, TokenLayout

_TEXT: Final = ("language_model.", "lm_head.")


class LlavaNextEncoder(GenericEncoder):
    """See `GenericEncoder`."""

    def _read(self, image: Image.Image) -> tuple[tuple[int, ...], Inputs]:
        found = self._processor.image_processor(images=[image])
        tiles, size = np.array(found["pixel_values"])[0], np.array(found["image_sizes"])[0]
        side = tiles.shape[-1] // self._processor.patch_size
        rows, columns = (each * side for each in self._grid_of(tiles, size))
        top, left = padding(size, rows, columns)
        tokens = side**2 + (rows - 2 * top) * (columns - 2 * left + 1)
        token = self._processor.tokenizer.convert_tokens_to_ids(self._placeholder)
        return (token,) * tokens, {"pixel_values": tiles[None], "image_sizes": size}

    def _features(self, pixels: Inputs, _layout: TokenLayout) -> mx.array:
        model, (tiles,), size = self.tower, pixels["pixel_values"], pixels["image_sizes"]
        encoder = model.vision_tower.vision_model
        values = mx.array(tiles).transpose(0, 2, 3, 1).astype(encoder.embeddings.patch_embedding.weight.dtype)
        *_, states = encoder(values, output_hidden_states=True)
        chosen = model.vision_feature_layer
        layers = chosen if isinstance(chosen, list | tuple) else [chosen]
        found = mx.concatenate([states[layer] for layer in layers], axis=-1)
        if model.vision_feature_select_strategy == "default":
            found = found[:, 1:]  # without the token that stands for the whole tile
        features = model.multi_modal_projector(found)
        return packed(features, model.image_newline, self._grid_of(tiles, size), size)[None]

    def _grid_of(self, tiles: Any, size: Any) -> tuple[int, int]:
        """Return the rows and columns of the tiles of an image, given its height and width."""
        resolutions = [tuple(each) for each in self._processor.image_processor.image_grid_pinpoints]
        height, width = select_best_resolution(tuple(size.tolist()), resolutions)
        return height // tiles.shape[-2], width // tiles.shape[-1]


def packed(features: mx.array, newline: mx.array, grid: tuple[int, int], size: Any) -> mx.array:
    """Return the features of an image in the order in which the language model was trained to read them.

    Args:
        features: [1 + tiles, tokens of a tile, hidden size]; the first is the whole image.
        newline: [hidden size] the vector at the end of a row.
        grid: rows and columns of tiles.
        size: height and width of the image in pixels.

    Returns:
        [tokens, hidden size]
    """
    rows, columns = grid
    _, tokens, hidden = features.shape
    side = isqrt(tokens)
    tiles = features[1:].reshape(rows, columns, side, side, hidden).transpose(0, 2, 1, 3, 4)
    rows, columns = rows * side, columns * side
    top, left = padding(size, rows, columns)
    kept = tiles.reshape(rows, columns, hidden)[top : rows - top, left : columns - left]
    ends = mx.broadcast_to(newline.astype(features.dtype), (kept.shape[0], 1, hidden))
    with_ends = mx.concatenate([kept, ends], axis=1)
    return mx.concatenate([features[0], with_ends.reshape(kept.shape[0] * with_ends.shape[1], hidden)])


def padding(size: Any, rows: int, columns: int) -> tuple[int, int]:
    """Return how many rows are padding at the top and at the bottom, and how many columns at the left and right.

    Args:
        size: height and width of the image, which was resized to fit into these rows and columns.
    """
    height, width = (int(each) for each in size)
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


class _NoLanguage(nn.Module):  # type: ignore[misc,name-defined]
    """Stands in for mlx-vlm's language model, which is not used here and is only for some architectures."""

    def __init__(self, _config: Any) -> None:
        super().__init__()

    @staticmethod
    def sanitize(weights: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the weights of the language model; those of recent folders have another prefix."""
        named = {name.removeprefix("model."): array for name, array in weights.items()}
        return {name: array for name, array in named.items() if not name.startswith(_TEXT)}


def load_without_language(folder: Path) -> Any:
    """Return mlx-vlm's model of a folder without its language model. The weights are not read yet."""
    with _replaced(llava_next, llava_next.llava_next):
        return utils.load_model(folder, lazy=True)


@contextmanager
def _replaced(*modules: Any) -> Iterator[None]:
    before = [module.LanguageModel for module in modules]
    for module in modules:
        module.LanguageModel = _NoLanguage
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.LanguageModel = own
