"""Rotary positions in three dimensions (M-RoPE): an image token has a time, a row and a column.

`MRope` takes the place of an attention layer's rotary positions. Passes without images, which include all decode steps,
need only a shift of the ordinary positions, because text tokens have three equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from worker.runner.vision.language import PassInputs


class Axes(Enum):
    """Which of the three positions rotates which frequency.

    Attributes:
        SECTIONS: consecutive frequencies share a position: time first, then row, then column.
        INTERLEAVED: the positions take turns, until the frequencies of rows and columns are used up; the rest are time.
    """

    SECTIONS = "sections"
    INTERLEAVED = "interleaved"

    def of(self, sections: Sequence[int], frequencies: int) -> list[int]:
        """Return the axis of each frequency.

        Args:
            sections: number of frequencies of each axis.
        """
        if self is Axes.SECTIONS:
            return [axis for axis, count in enumerate(sections) for _ in range(count)]
        axes = [0] * frequencies
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
        return axes


class MRope(nn.Module):  # type: ignore[misc,name-defined]  # MLX has no types for it
    """Rotary positions of one attention layer.

    Args:
        rope: the layer's own, for text.
        axes: the axis of each frequency.
        inputs: the images of the current pass.
    """

    def __init__(self, rope: Any, axes: Sequence[int], inputs: PassInputs) -> None:
        super().__init__()
        self.rope = rope
        self._axes = np.array(axes, dtype=np.int32)
        self._inputs = inputs
        exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / rope.dims
        self._frequencies = (1.0 / rope.base**exponents).astype(np.float32)

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """Rotate queries or keys [rows, heads, length, size].

        Args:
            offset: [rows] position of the first token of each row, without images.
        """
        inputs = self._inputs
        if not any(inputs.media):
            shifted = offset if inputs.shifts is None else offset + inputs.shifts
            rotated: mx.array = self.rope(x, offset=shifted)
            return rotated
        key = (self.rope.dims, self.rope.base)
        if key not in inputs.rotations:
            inputs.rotations[key] = self._rotation(offset, x.shape[0], x.shape[2])
        return self._rotated(x, *inputs.rotations[key])

    def _rotation(self, offset: Any, rows: int, length: int) -> tuple[mx.array, mx.array]:
        """Return cosines and sines [rows, 1, length, frequencies] for the tokens of a pass."""
        offsets = mx.broadcast_to(mx.array(offset), (rows,))
        text = mx.broadcast_to(offsets[:, None] + mx.arange(length), (3, rows, length))
        by_row = [
            text[:, row : row + 1] if each is None else mx.array(each.media.at(each.start, length))[:, None]
            for row, each in enumerate(self._inputs.media)
        ]
        positions = mx.concatenate(by_row, axis=1)[mx.array(self._axes)]  # [frequencies, rows, length]
        angles = positions.transpose(1, 2, 0).astype(mx.float32) * mx.array(self._frequencies)
        return mx.cos(angles)[:, None], mx.sin(angles)[:, None]

    def _rotated(self, x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
        dims = self.rope.dims
        exact = x[..., :dims].astype(mx.float32)
        if self.rope.traditional:  # pairs of neighbours
            one, other = exact[..., ::2], exact[..., 1::2]
        else:
            one, other = exact[..., : dims // 2], exact[..., dims // 2 :]
        pairs = [one * cosines - other * sines, one * sines + other * cosines]
        rotated = mx.stack(pairs, axis=-1).flatten(-2) if self.rope.traditional else mx.concatenate(pairs, axis=-1)
        return mx.concatenate([rotated.astype(x.dtype), x[..., dims:]], axis=-1)


def use_mrope(language: Any, axes: Axes, sections: Sequence[int], inputs: PassInputs) -> None:
    """Replace the rotary positions of every attention layer of a model.

    Raises:
        ValueError: the model's own rotary positions are of a kind that has no three dimensions, or are scaled.
    """
    for _, module in language.named_modules():
        rope = module.get("rope")
        if rope is None:
            continue
        if not isinstance(rope, nn.RoPE) or rope.scale != 1.0:  # type: ignore[attr-defined]
            raise ValueError(f"rotary positions of type {type(rope).__name__} have no rows and columns")
        module.rope = MRope(rope, axes.of(sections, rope.dims // 2), inputs)
