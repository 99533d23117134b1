"""The image encoder of the Qwen-VL family: runs mlx-vlm's vision tower block by block.

It computes the same as mlx-vlm's `VisionModel`, with the same layers, but in stages, so that decoding rows do not wait
for a whole screenshot. Values that depend only on the image size are computed on the host; mlx-vlm computes them on the
device, and so waits for all work queued there.
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
from worker.runner.vision.images import Grid, PlacedImage, decode_image

_WARM_SIDES = (8, 16)
"""Side lengths, in patches, of the images that are encoded to measure the cost."""


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
        self._layout = lru_cache(64)(self._compute_layout)
        self._cost = (0.0, 1.0)  # seconds per image and per patch
        side = processor.patch_size * processor.merge_size
        self.geometry = ImageGeometry(side, processor.min_pixels, processor.max_pixels)
        self._values = 3 * processor.temporal_patch_size * processor.patch_size**2

    @property
    def parameters(self) -> int:
        """See `Encoder.parameters`."""
        return sum(array.size for array in dict(tree_flatten(self.tower.parameters())).values())

    @property
    def nbytes(self) -> int:
        """See `Encoder.nbytes`."""
        return sum(array.nbytes for array in dict(tree_flatten(self.tower.parameters())).values())

    @property
    def blocks(self) -> int:
        """See `Encoder.blocks`."""
        return len(self.tower.blocks)

    def grid(self, width: int, height: int) -> Grid:
        """See `Encoder.grid`."""
        width, height = self.geometry.resized(width, height)
        patch = self._processor.patch_size
        return Grid(height // patch, width // patch, self._processor.merge_size)

    def pixels(self, image: PlacedImage) -> Floats:
        """See `Encoder.pixels`."""
        processed = self._processor(images=[decode_image(image.data, image.pixels)])
        if processed["image_grid_thw"].tolist() != [[1, image.grid.rows, image.grid.columns]]:
            raise ValueError(f"the size of image {image.digest[:12]} differs from the size in the request")
        values: Floats = processed["pixel_values"]
        return values

    def warming(self) -> Iterator[None]:
        """See `Encoder.warming`."""
        small, large = (Grid(side, side, self._processor.merge_size) for side in _WARM_SIDES)
        seconds: dict[Grid, list[float]] = {small: [], large: []}
        for grid in (small, large) * 3:
            seconds[grid].append(self._timed(grid))
            yield
        small_s, large_s = (min(seconds[grid]) for grid in (small, large))
        per_patch = max(large_s - small_s, large_s / 100) / (large.patches - small.patches)
        self._cost = (max(small_s - small.patches * per_patch, 0.0), per_patch)

    def seconds(self, grid: Grid) -> float:
        """See `Encoder.seconds`."""
        per_image, per_patch = self._cost
        return per_image + grid.patches * per_patch

    def bytes(self, grid: Grid) -> int:
        """See `Encoder.bytes`."""
        config = self.tower.config
        values = config.hidden_size + config.intermediate_size
        # On a CPU, attention stores the whole score matrix twice. GPU kernels do not store it.
        scores = 2 * config.num_heads * grid.patches if mx.default_device() == mx.cpu else 0
        return int(grid.patches * (4 * values + scores) * 4)

    def _timed(self, grid: Grid) -> float:
        start = time.perf_counter()
        mx.eval([*self.stages(np.zeros((grid.patches, self._values), np.float32), grid)][-1])
        return time.perf_counter() - start

    def stages(self, pixels: Floats, grid: Grid) -> Iterator[mx.array]:
        """See `Encoder.stages`."""
        tower = self.tower
        order, whole_bounds, window_bounds, rotation = self._layout(grid)
        hidden = tower.patch_embed(mx.array(pixels).astype(tower.patch_embed.proj.weight.dtype))
        hidden = _by_token(hidden, grid)[order].reshape(hidden.shape)
        for number, block in enumerate(tower.blocks):
            bounds = whole_bounds if number in tower.fullatt_block_indexes else window_bounds
            # The block converts the bounds to a list. As numpy arrays, they need no wait for the device.
            hidden = block(hidden, cu_seqlens=bounds, rotary_pos_emb=rotation)
            if number + 1 < self.blocks:
                yield hidden
        yield tower.merger(hidden)[mx.argsort(order)]

    def encode(self, image: PlacedImage) -> mx.array:
        """Return the features [tokens, hidden size] of an image, unevaluated."""
        *_, features = self.stages(self.pixels(image), image.grid)
        return features

    def _compute_layout(self, grid: Grid) -> tuple[mx.array, Any, Any, mx.array]:
        """Compute everything that depends only on the image size.

        Returns:
            The order of tokens by attention window, the bounds of attention in patches for blocks with full attention
            and for blocks with windows, and the rotation angles [patches, values] in that order.
        """
        height, width = grid.rows // grid.merge, grid.columns // grid.merge
        rows, columns = np.divmod(np.arange(height * width), width)
        window = rows // self._window * -(-width // self._window) + columns // self._window
        order = np.argsort(window, kind="stable")
        counts = np.bincount(window)
        ends = np.cumsum(counts[counts > 0]) * grid.merge**2
        window_bounds, whole_bounds = np.concatenate([[0], ends]), np.array([0, grid.patches])
        angles = _by_token(mx.array(self._angles(grid)), grid)[mx.array(order)]
        return mx.array(order), whole_bounds, window_bounds, angles.reshape(grid.patches, -1)

    def _angles(self, grid: Grid) -> Floats:
        """Return the rotation angles [patches, values] by row and column, in the patch order of the processor."""
        table = np.array(self.tower.rotary_pos_emb(mx.array(max(grid.rows, grid.columns))))
        merge = grid.merge
        shape = (grid.rows // merge, grid.columns // merge, merge, merge)
        rows = np.broadcast_to(np.arange(grid.rows).reshape(-1, 1, merge, 1), shape).ravel()
        columns = np.broadcast_to(np.arange(grid.columns).reshape(1, -1, 1, merge), shape).ravel()
        return np.concatenate([table[rows], table[columns]], axis=-1)


def _by_token(values: mx.array, grid: Grid) -> mx.array:
    """Reshape [patches, values] to [tokens, patches per token, values]."""
    return values.reshape(grid.tokens, grid.merge**2, -1)
