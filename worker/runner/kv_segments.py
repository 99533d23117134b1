"""KV segments: the parts of row caches that the prefix cache stores. The model decides which of two types is possible.

Plain attention has a key and a value per token, so any consecutive tokens can be stored, split and joined again. The
state of sliding windows and state-space layers cannot be split: it is stored whole and can only be used at the token
where it was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import mlx.core as mx
import numpy as np

from worker.runner import kv_cache
from worker.runner.kv_cache import Columns, KVCache, RowCache
from worker.runner.prefix.blocks import Block, Tensor

_TYPES = {mx.float32: ("F32", np.float32), mx.float16: ("F16", np.float16), mx.bfloat16: ("BF16", np.uint16)}
"""Safetensors names of the number types that a cache may have, and numpy types of the same size."""


class Segment(Protocol):
    """The stored cache of consecutive tokens of a row. Immutable.

    Attributes:
        splittable: whether a row that shares only the first tokens can use these.
    """

    splittable: bool
    nbytes: int

    @classmethod
    def copy_from(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:
        """Copy tokens `start` to `stop` of a row, which has `stop` tokens. Queues the copy on the device.

        Args:
            row: batch index.
        """
        ...

    def split(self, at: int) -> tuple[Self | None, Self]:
        """Split into the first `at` tokens and the rest. The first part is None if it cannot be separated."""
        ...

    @classmethod
    def join(cls, segments: Sequence[Any], length: int) -> RowCache:
        """Return the cache of one row of `length` tokens from consecutive segments that begin with its first token."""
        ...


class AttentionSegment:
    """Keys and values of consecutive tokens."""

    splittable = True

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.nbytes = sum(keys.nbytes + values.nbytes for keys, values in columns)

    @classmethod
    def copy_from(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:
        """See `Segment.copy_from`."""
        return cls._queued(cache.copy_columns(row, start, stop))

    def split(self, at: int) -> tuple[Self, Self]:
        """See `Segment.split`."""
        return self._part(0, at), self._part(at, self.length)

    @classmethod
    def join(cls, segments: Sequence[AttentionSegment], length: int) -> RowCache:
        """See `Segment.join`."""
        layers = zip(*(segment.columns for segment in segments), strict=True)
        joined = ([_joined(arrays, length) for arrays in zip(*parts, strict=True)] for parts in layers)
        return kv_cache.row_of_columns([(keys, values) for keys, values in joined], length)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.columns[0][0].shape[2])

    def after(self, at: int) -> Self:
        """Return the segment without its first `at` tokens."""
        return self._part(at, self.length) if at else self

    def tensors(self) -> Block:
        """Return the arrays as host memory. They are not copied, so keep the segment as long as they are used."""
        return [_tensor(array) for pair in self.columns for array in pair]

    @classmethod
    def from_tensors(cls, block: Block) -> Self:
        """Return the segment of these tensors; the inverse of `tensors`. Copies them."""
        arrays = [_array(tensor) for tensor in block]
        return cls._queued(list(zip(arrays[::2], arrays[1::2], strict=True)))

    def _part(self, start: int, stop: int) -> Self:
        return self._queued([kv_cache.copied(keys, values, 0, start, stop) for keys, values in self.columns])

    @classmethod
    def _queued(cls, columns: Columns) -> Self:
        # Copy now: a lazy slice would keep the cache of the whole batch, and the next step would have to copy it.
        mx.async_eval(columns)  # type: ignore[no-untyped-call]
        return cls(columns)


class StateSegment:
    """The whole state of a row at one token: for sliding windows, state-space layers and hybrids."""

    splittable = False

    def __init__(self, row: RowCache) -> None:
        self.row = row
        self.nbytes = kv_cache.row_nbytes(row)

    @classmethod
    def copy_from(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:  # noqa: ARG003 - always whole
        """See `Segment.copy_from`."""
        return cls(cache.copy_row(row))

    def split(self, at: int) -> tuple[None, Self]:  # noqa: ARG002
        """See `Segment.split`."""
        return None, self

    @classmethod
    def join(cls, segments: Sequence[StateSegment], length: int) -> RowCache:  # noqa: ARG003
        """See `Segment.join`."""
        return segments[-1].row


def segment_type(model: Any) -> type[Segment] | None:
    """Return the type of segment for this model's cache; None if the cache of a row cannot be stored."""
    if kv_cache.plain(model):
        return AttentionSegment
    return StateSegment if kv_cache.extractable(model) else None


def storable(model: Any) -> bool:
    """Return whether segments of this model can be written to files. Only plain attention can."""
    return segment_type(model) is AttentionSegment


def _tensor(array: mx.array) -> Tensor:
    return Tensor(_TYPES[array.dtype][0], array.shape, np.frombuffer(memoryview(cast("Any", array)), np.uint8))


def _array(tensor: Tensor) -> mx.array:
    dtype, bits = next((dtype, bits) for dtype, (name, bits) in _TYPES.items() if name == tensor.dtype)
    return mx.array(tensor.data.view(bits).reshape(tensor.shape)).view(dtype)


def _joined(arrays: Sequence[mx.array], length: int) -> mx.array:
    *whole, last = arrays
    part = last[:, :, : length - sum(array.shape[2] for array in whole)]
    return mx.concatenate([*whole, part], axis=2) if whole else part
