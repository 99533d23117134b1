"""The image encoders of the Qwen-VL families: run mlx-vlm's vision tower block by block.

They compute the same as mlx-vlm's `VisionModel`, with the same layers, but in stages, so that decoding rows do not wait
for a whole screenshot. Values that depend only on the image size are computed on the host; mlx-vlm computes them on the
device, and so waits for all work queued there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from shared.models.image_geometry import ImageGeometry
from worker.runner.vision.images import Grid, PlacedImage, decode_image

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Bounds: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

_WARM_SIDES = (8, 16)
"""Side lengths, in patches, of the images that are encoded to measure the cost."""


class QwenEncoder:
    """See `worker.runner.vision.half.Encoder`. This class encodes for Qwen2-VL.

    Args:
        tower: mlx-vlm's vision model.
        processor: mlx-vlm's image processor: resizes, normalises and cuts into patches.
    """

    def __init__(self, tower: Any, processor: Any) -> None:
        self.tower = tower
        self._processor = processor
        self._cached_angles = lru_cache(64)(self._angles)
        self._cost = (0.0, 1.0)  # seconds per image and per patch
        side = processor.patch_size * processor.merge_size
        self.geometry: ImageGeometry | None = ImageGeometry(side, processor.min_pixels, processor.max_pixels)
        self._values = 3 * processor.temporal_patch_size * processor.patch_size**2

    @property
    def blocks(self) -> int:
        """See `Encoder.blocks`."""
        return len(self.tower.blocks)

    def layout(self, width: int, height: int) -> Grid:
        """See `Encoder.layout`."""
        assert self.geometry is not None  # noqa: S101 - of these families, it is known
        width, height = self.geometry.resized(width, height)
        patch = self._processor.patch_size
        return Grid(height // patch, width // patch, self._processor.merge_size)

    def pixels(self, image: PlacedImage) -> Floats:
        """See `Encoder.pixels`."""
        processed = self._processor(images=[decode_image(image.data, image.pixels)])
        grid = image.layout
        if not isinstance(grid, Grid) or processed["image_grid_thw"].tolist() != [[1, grid.rows, grid.columns]]:
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

    def seconds(self, layout: Any) -> float:
        """See `Encoder.seconds`."""
        per_image, per_patch = self._cost
        return per_image + int(layout.patches) * per_patch

    def bytes(self, layout: Any) -> int:
        """See `Encoder.bytes`."""
        config, patches = self.tower.config, layout.patches
        # On a CPU, attention stores the whole score matrix twice. GPU kernels do not store it.
        scores = 2 * config.num_heads * patches if mx.default_device() == mx.cpu else 0
        return int(patches * (3 * self._values + 4 * self._values_per_patch(config) + scores) * 4)

    def stages(self, pixels: Floats, layout: Any) -> Iterator[mx.array]:
        """See `Encoder.stages`."""
        hidden, bounds = self._embedded(pixels, layout), np.array([0, layout.patches])
        rotation = self._cached_angles(layout)
        for number, block in enumerate(self.tower.blocks):
            # The block converts the bounds to a list. As numpy arrays, they need no wait for the device.
            hidden = block(hidden, cu_seqlens=bounds, rotary_pos_emb=rotation)
            if number + 1 < self.blocks:
                yield hidden
        yield self.tower.merger(hidden)[None]

    def encode(self, image: PlacedImage) -> mx.array:
        """See `Encoder.encode`."""
        *_, features = self.stages(self.pixels(image), image.layout)
        return features

    def _values_per_patch(self, config: Any) -> int:
        return int(config.embed_dim * (1 + config.mlp_ratio))

    def _timed(self, grid: Grid) -> float:
        start = time.perf_counter()
        mx.eval([*self.stages(np.zeros((grid.patches, self._values), np.float32), grid)][-1])
        return time.perf_counter() - start

    def _embedded(self, pixels: Floats, grid: Grid) -> mx.array:  # noqa: ARG002 - for subclasses
        patch_embed = self.tower.patch_embed
        embedded: mx.array = patch_embed(mx.array(pixels).astype(patch_embed.proj.weight.dtype))
        return embedded

    def _angles(self, grid: Grid) -> mx.array:
        """Return the rotation angles [patches, values] by row and column, in the patch order of the processor."""
        rotary = self.tower.rotary_pos_emb
        exponents = np.arange(0, rotary.dim, 2, dtype=np.float32) / rotary.dim
        frequencies = (1.0 / rotary.theta**exponents).astype(np.float32)
        rows, columns = (places.astype(np.float32)[:, None] * frequencies for places in _places(grid))
        return mx.array(np.concatenate([rows, columns], axis=-1))


class WindowEncoder(QwenEncoder):
    """The encoder of Qwen2.5-VL: in most blocks, patches attend only to those of the same window."""

    def __init__(self, tower: Any, processor: Any) -> None:
        super().__init__(tower, processor)
        self._window = tower.window_size // tower.patch_size // tower.spatial_merge_size
        self._layout = lru_cache(64)(self._compute_layout)

    def stages(self, pixels: Floats, layout: Any) -> Iterator[mx.array]:
        """See `Encoder.stages`."""
        order, whole_bounds, window_bounds, rotation = self._layout(layout)
        hidden = self._embedded(pixels, layout)
        hidden = _by_token(hidden, layout)[order].reshape(hidden.shape)
        for number, block in enumerate(self.tower.blocks):
            bounds = whole_bounds if number in self.tower.fullatt_block_indexes else window_bounds
            hidden = block(hidden, cu_seqlens=bounds, rotary_pos_emb=rotation)
            if number + 1 < self.blocks:
                yield hidden
        yield self.tower.merger(hidden)[mx.argsort(order)][None]

    def _values_per_patch(self, config: Any) -> int:
        return int(config.hidden_size + config.intermediate_size)

    def _compute_layout(self, grid: Grid) -> tuple[mx.array, Bounds, Bounds, mx.array]:
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
        angles = _by_token(self._angles(grid), grid)[mx.array(order)]
        return mx.array(order), whole_bounds, window_bounds, angles.reshape(grid.patches, -1)


class DeepstackEncoder(QwenEncoder):
    """The encoder of Qwen3-VL and Qwen3.5: learned positions, and features of some blocks for the language model."""

    def __init__(self, tower: Any, processor: Any) -> None:
        super().__init__(tower, processor)
        self._cached_positions = lru_cache(64)(self._positions)

    def stages(self, pixels: Floats, layout: Any) -> Iterator[mx.array]:
        """See `Encoder.stages`."""
        features: list[mx.array] = []
        *others, last = range(self.blocks)
        stages = self._block_outputs(pixels, layout)
        for number in others:
            hidden = next(stages)
            features += self._deepstack(number, hidden)
            yield hidden
        hidden = next(stages)
        features += self._deepstack(last, hidden)
        yield mx.stack([self.tower.merger(hidden), *features])

    def _block_outputs(self, pixels: Floats, grid: Grid) -> Iterator[mx.array]:
        hidden, bounds = self._embedded(pixels, grid), np.array([0, grid.patches])
        rotation = self._cached_angles(grid)
        for block in self.tower.blocks:
            hidden = block(hidden, cu_seqlens=bounds, rotary_pos_emb=rotation)
            yield hidden

    def _deepstack(self, block: int, hidden: mx.array) -> list[mx.array]:
        """Return the features of a block for the language model; none of most blocks."""
        tower = self.tower
        chosen = [number for number, index in enumerate(tower.deepstack_visual_indexes) if index == block]
        return [tower.deepstack_merger_list[number](hidden) for number in chosen]

    def _values_per_patch(self, config: Any) -> int:
        return int(config.hidden_size + config.intermediate_size)

    def _embedded(self, pixels: Floats, grid: Grid) -> mx.array:
        indices, weights = self._cached_positions(grid)
        corners = self.tower.pos_embed(indices)
        positions = (corners * weights.astype(corners.dtype)[..., None]).sum(axis=0)
        embedded: mx.array = super()._embedded(pixels, grid) + positions
        return embedded

    def _positions(self, grid: Grid) -> tuple[mx.array, mx.array]:
        """Return the four learned positions around each patch and their weights, each [4, patches]."""
        side = self.tower.num_grid_per_side
        rows, columns = _places(grid)
        top, vertical = _between(rows, grid.rows, side)
        left, horizontal = _between(columns, grid.columns, side)
        bottom, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
        corners = [
            (top, left, (1 - vertical) * (1 - horizontal)),
            (top, right, (1 - vertical) * horizontal),
            (bottom, left, vertical * (1 - horizontal)),
            (bottom, right, vertical * horizontal),
        ]
        indices = np.stack([row * side + column for row, column, _ in corners])
        return mx.array(indices), mx.array(np.stack([weight for _, _, weight in corners]))


def _places(grid: Grid) -> tuple[Any, Any]:
    """Return the row and the column of each patch, in the patch order of the processor."""
    merge = grid.merge
    shape = (grid.rows // merge, grid.columns // merge, merge, merge)
    rows = np.broadcast_to(np.arange(grid.rows).reshape(-1, 1, merge, 1), shape)
    columns = np.broadcast_to(np.arange(grid.columns).reshape(1, -1, 1, merge), shape)
    return rows.ravel(), columns.ravel()


def _between(places: Any, count: int, side: int) -> tuple[Any, Any]:
    """Spread `count` places over `side` points. Return the point before each place, and the distance from it."""
    spread = np.array(mx.linspace(0, side - 1, count))[places]
    before = spread.astype(np.int32)
    return before, (spread - before).astype(np.float32)


def _by_token(values: mx.array, grid: Grid) -> mx.array:
    """Reshape [patches, values] to [tokens, patches per token, values]."""
    return values.reshape(grid.tokens, grid.merge**2, -1)
