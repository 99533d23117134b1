"""The image encoder of the Qwen-VL family: mlx-vlm's vision tower, a block at a time.

It computes what mlx-vlm's `VisionModel` does, with its layers, but in stages, so that rows that decode need not wait
for a whole screenshot; and it computes on the host what depends on the image's size alone, where mlx-vlm's own call
asks the device and waits for whatever is queued there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from shared.models.image_geometry import ImageGeometry
from worker.runner.vision.family import Floats
from worker.runner.vision.images import Grid, PlacedImage, opened

_WARM_SIDES = (8, 16)
"""Patches a side of the images that are encoded to measure what that takes."""


class QwenEncoder:
    """See `worker.runner.vision.family.Encoder`.

    Args:
        tower: mlx-vlm's vision model of Qwen2.5-VL.
        processor: mlx-vlm's image processor: resizes, normalises and cuts into patches.
    """

    def __init__(self, tower: Any, processor: Any) -> None:
        self.tower = tower
        self._processor = processor
        self._window = tower.window_size // tower.patch_size // tower.spatial_merge_size
        self._order = lru_cache(64)(self._order_of)
        self._cost = (0.0, 1.0)
        side = processor.patch_size * processor.merge_size
        self.geometry = ImageGeometry(side, processor.min_pixels, processor.max_pixels)
        self._values = 3 * processor.temporal_patch_size * processor.patch_size**2

    @property
    def parameters(self) -> int:
        """How many the tower has."""
        return sum(array.size for array in dict(tree_flatten(self.tower.parameters())).values())

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(array.nbytes for array in dict(tree_flatten(self.tower.parameters())).values())

    @property
    def blocks(self) -> int:
        """Stages of an image."""
        return len(self.tower.blocks)

    def grid(self, width: int, height: int) -> Grid:
        """See `Encoder.grid`."""
        wide, high = self.geometry.resized(width, height)
        patch = self._processor.patch_size
        return Grid(high // patch, wide // patch, self._processor.merge_size)

    def pixels(self, image: PlacedImage) -> Floats:
        """See `Encoder.pixels`."""
        processed = self._processor(images=[opened(image.data)])
        if processed["image_grid_thw"].tolist() != [[1, image.grid.high, image.grid.wide]]:
            raise ValueError(f"image {image.digest[:12]} does not have the announced size")
        values: Floats = processed["pixel_values"]
        return values

    def warming(self) -> Iterator[None]:
        """See `Encoder.warming`."""
        small, large = (Grid(side, side, self._processor.merge_size) for side in _WARM_SIDES)
        took_s: dict[Grid, list[float]] = {small: [], large: []}
        for grid in (small, large) * 3:
            took_s[grid].append(self._timed(grid))
            yield
        least, most = (min(took_s[grid]) for grid in (small, large))
        each = max(most - least, most / 100) / (large.patches - small.patches)
        self._cost = (max(least - small.patches * each, 0.0), each)

    def seconds(self, grid: Grid) -> float:
        """See `Encoder.seconds`."""
        fixed, each = self._cost
        return fixed + grid.patches * each

    def bytes(self, grid: Grid) -> int:
        """See `Encoder.bytes`."""
        config = self.tower.config
        values = config.hidden_size + config.intermediate_size
        # Only a GPU attends without writing all scores down, twice.
        scores = 2 * config.num_heads * grid.patches if mx.default_device() == mx.cpu else 0
        return int(grid.patches * (4 * values + scores) * 4)

    def _timed(self, grid: Grid) -> float:
        start = time.perf_counter()
        mx.eval([*self.stages(np.zeros((grid.patches, self._values), np.float32), grid)][-1])
        return time.perf_counter() - start

    def stages(self, pixels: Floats, grid: Grid) -> Iterator[mx.array]:
        """See `Encoder.stages`."""
        tower = self.tower
        order, whole, windows, freqs = self._order(grid)
        hidden = tower.patch_embed(mx.array(pixels).astype(tower.patch_embed.proj.weight.dtype))
        hidden = _by_token(hidden, grid)[order].reshape(hidden.shape)
        for number, block in enumerate(tower.blocks):
            cuts = whole if number in tower.fullatt_block_indexes else windows
            # The block only cuts at them and turns them into a list: on the host that waits for nothing.
            hidden = block(hidden, cu_seqlens=cuts, rotary_pos_emb=freqs)
            if number + 1 < self.blocks:
                yield hidden
        yield tower.merger(hidden)[mx.argsort(order)]

    def encode(self, image: PlacedImage) -> mx.array:
        """[tokens, hidden] of an image, all at once; not computed yet."""
        *_, features = self.stages(self.pixels(image), image.grid)
        return features

    def _order_of(self, grid: Grid) -> tuple[mx.array, Any, Any, mx.array]:
        """Of a size: tokens by window, where attention is cut in the two kinds of blocks, angles of rotation."""
        high, wide = grid.high // grid.merge, grid.wide // grid.merge
        rows, columns = np.divmod(np.arange(high * wide), wide)
        window = rows // self._window * -(-wide // self._window) + columns // self._window
        order = np.argsort(window, kind="stable")
        counts = np.bincount(window)
        ends = np.cumsum(counts[counts > 0]) * grid.merge**2
        windows, whole = np.concatenate([[0], ends]), np.array([0, grid.patches])
        angles = _by_token(mx.array(self._angles(grid)), grid)[mx.array(order)]
        return mx.array(order), whole, windows, angles.reshape(grid.patches, -1)

    def _angles(self, grid: Grid) -> Floats:
        """[patches, values] of the rotation by row and column, in the order in which the processor gives patches."""
        table = np.array(self.tower.rotary_pos_emb(mx.array(max(grid.high, grid.wide))))
        merge = grid.merge
        shape = (grid.high // merge, grid.wide // merge, merge, merge)
        rows = np.broadcast_to(np.arange(grid.high).reshape(-1, 1, merge, 1), shape).ravel()
        columns = np.broadcast_to(np.arange(grid.wide).reshape(1, -1, 1, merge), shape).ravel()
        return np.concatenate([table[rows], table[columns]], axis=-1)


def _by_token(values: mx.array, grid: Grid) -> mx.array:
    """[tokens, patches of a token, values] of [patches, values]."""
    return values.reshape(grid.tokens, grid.merge**2, -1)
