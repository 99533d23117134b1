"""What is kept of a row's cache after it has left the batch, in the two kinds that models allow.

Plain attention has a key and a value for each token: any run of tokens can be kept, cut and joined again. The state of
sliding windows and state-space layers cannot be cut: it is kept whole and is of use only at the token where it was
taken.
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
"""Safetensors' names of the types that a cache may have, and numpy types that carry the same bits."""


class Segment(Protocol):
    """What is kept of a run of tokens of a row. Never changed.

    Attributes:
        cuttable: whether a row that shares only its first tokens can use those.
    """

    cuttable: bool
    nbytes: int

    @classmethod
    def of(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:
        """Copy it from a batch's cache, in which this row has `stop` tokens. Queues the copy on the device."""
        ...

    def cut(self, at: int) -> tuple[Self | None, Self]:
        """Split it into its first `at` tokens and the rest."""
        ...

    @classmethod
    def join(cls, segments: Sequence[Any], length: int) -> RowCache:
        """The cache of one row with `length` tokens, from the segments of its path."""
        ...


class AttentionSegment:
    """Keys and values of a run of tokens."""

    cuttable = True

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.nbytes = sum(keys.nbytes + values.nbytes for keys, values in columns)

    @classmethod
    def of(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:
        """See `Segment.of`."""
        return cls._queued(cache.read_columns(row, start, stop))

    def cut(self, at: int) -> tuple[Self, Self]:
        """See `Segment.cut`."""
        return self._part(0, at), self._part(at, self.length)

    @classmethod
    def join(cls, segments: Sequence[AttentionSegment], length: int) -> RowCache:
        """See `Segment.join`."""
        layers = zip(*(segment.columns for segment in segments), strict=True)
        joined = ([_joined(arrays, length) for arrays in zip(*parts, strict=True)] for parts in layers)
        return kv_cache.row_of_columns([(keys, values) for keys, values in joined], length)

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return int(self.columns[0][0].shape[2])

    def behind(self, at: int) -> Self:
        """What follows the first `at` tokens."""
        return self._part(at, self.length) if at else self

    def tensors(self) -> Block:
        """Its arrays as host memory, not copied; the segment must be kept as long as they are used."""
        return [_tensor(array) for pair in self.columns for array in pair]

    @classmethod
    def from_tensors(cls, block: Block) -> Self:
        """The opposite of `tensors`. Copies them."""
        arrays = [_array(tensor) for tensor in block]
        return cls._queued(list(zip(arrays[::2], arrays[1::2], strict=True)))

    def _part(self, start: int, stop: int) -> Self:
        return self._queued([kv_cache.copied(keys, values, 0, start, stop) for keys, values in self.columns])

    @classmethod
    def _queued(cls, columns: Columns) -> Self:
        # At once: a lazy slice would keep the whole batch's cache, and make the next step copy it.
        mx.async_eval(columns)  # type: ignore[no-untyped-call]
        return cls(columns)


class StateSegment:
    """All that a model holds of a row at one token: for sliding windows, state-space layers and mixtures."""

    cuttable = False

    def __init__(self, row: RowCache) -> None:
        self.row = row
        self.nbytes = kv_cache.row_nbytes(row)

    @classmethod
    def of(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:  # noqa: ARG003 - it is whole or nothing
        """See `Segment.of`."""
        return cls(cache.read_row(row))

    def cut(self, at: int) -> tuple[None, Self]:  # noqa: ARG002
        """See `Segment.cut`."""
        return None, self

    @classmethod
    def join(cls, segments: Sequence[StateSegment], length: int) -> RowCache:  # noqa: ARG003
        """See `Segment.join`."""
        return segments[-1].row


def kind_for(model: Any) -> type[Segment] | None:
    """The kind of segment that this model's cache can be kept in; None when it cannot be kept."""
    if kv_cache.plain(model):
        return AttentionSegment
    return StateSegment if kv_cache.extractable(model) else None


def storable(model: Any) -> bool:
    """Whether segments of this model's cache can be written to files: plain attention only."""
    return kind_for(model) is AttentionSegment


def _tensor(array: mx.array) -> Tensor:
    return Tensor(_TYPES[array.dtype][0], array.shape, np.frombuffer(memoryview(cast("Any", array)), np.uint8))


def _array(tensor: Tensor) -> mx.array:
    dtype, bits = next((dtype, bits) for dtype, (name, bits) in _TYPES.items() if name == tensor.dtype)
    return mx.array(tensor.data.view(bits).reshape(tensor.shape)).view(dtype)


def _joined(arrays: Sequence[mx.array], length: int) -> mx.array:
    *whole, last = arrays
    part = last[:, :, : length - sum(array.shape[2] for array in whole)]
    return mx.concatenate([*whole, part], axis=2) if whole else part
