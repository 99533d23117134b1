"""The parts of row caches that the prefix cache stores: columns of attention layers, and states of recurrent layers.

Attention has columns for each token, so any consecutive tokens can be stored, split and joined again (`Segment`). A row
needs only the last window of a layer with a sliding window. The columns before it are stored so that other rows can
begin at an earlier token. If a prefix would be too large with all of them, it is thinned: most of them are dropped.

The state of a recurrent layer cannot be split: it is stored as it was after a certain token (`Checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import mlx.core as mx
import numpy as np

from worker.runner import kv_cache
from worker.runner.kv_cache import Columns, KVCache, States
from worker.runner.prefix.blocks import Block, Tensor

_TYPES = {
    mx.float32: ("F32", np.float32),
    mx.float16: ("F16", np.float16),
    mx.bfloat16: ("BF16", np.uint16),
    mx.uint32: ("U32", np.uint32),
    mx.int32: ("I32", np.int32),
    mx.int64: ("I64", np.int64),
}
"""Safetensors names of the number types that a cache may have, and numpy types of the same size."""


CUTTABLE_TOKENS = 2048
"""Minimum number of tokens at the end of a thinned prefix after any of which a row can begin."""

THINNED_WINDOWS = 8
"""Before these tokens, one window is kept per this many windows, or per `CUTTABLE_TOKENS` if that is longer. Gemma 3
12B takes 384 KiB per token with all columns, 64 KiB without those of windows, and about 120 KiB thinned."""


class Segment:
    """The columns of consecutive tokens of a row. Immutable.

    Attributes:
        length: number of tokens.
        columns: by attention part, the columns of the last tokens; of all of them, unless a sliding window has dropped
            the first ones.
        complete: number of last tokens for which every part has its columns.
    """

    def __init__(self, length: int, columns: Columns) -> None:
        self.length = length
        self.columns = columns
        self.complete = min((arrays[0].shape[2] for arrays in columns if arrays), default=length)
        self.nbytes = sum(array.nbytes for arrays in columns for array in arrays)

    @classmethod
    def copy_from(cls, cache: KVCache, row: int, start: int, stop: int) -> Self:
        """Copy tokens `start` to `stop` of a row, which has `stop` tokens. Queues the copy on the device.

        Args:
            row: batch index.
        """
        return cls._queued(stop - start, cache.copy_columns(row, stop - start))

    def split(self, at: int) -> tuple[Self, Self]:
        """Split into the first `at` tokens and the rest."""
        return self._part(0, at), self._part(at, self.length)

    def after(self, at: int) -> Self:
        """Return the segment without its first `at` tokens."""
        return self._part(at, self.length) if at else self

    def without_windows(self, windows: Sequence[int | None]) -> Self:
        """Return the segment without the columns of layers that have a sliding window, given by attention part."""
        columns = [
            [mx.zeros((*array.shape[:2], 0, array.shape[3]), array.dtype) for array in arrays] if window else arrays
            for arrays, window in zip(self.columns, windows, strict=True)
        ]
        return self._queued(self.length, columns)

    def tensors(self) -> Block:
        """Return the arrays as host memory. They are not copied, so keep the segment as long as they are used."""
        return [_tensor(array) for arrays in self.columns for array in arrays]

    @classmethod
    def from_tensors(cls, length: int, tensors: Sequence[Tensor], like: Sequence[int]) -> Self:
        """Return the segment of these tensors; the inverse of `tensors`. Copies them.

        Args:
            like: number of arrays by attention part.
        """
        arrays = iter([_array(tensor) for tensor in tensors])
        return cls._queued(length, [[next(arrays) for _ in range(count)] for count in like])

    def _part(self, start: int, stop: int) -> Self:
        columns = []
        for arrays in self.columns:
            missing = self.length - arrays[0].shape[2] if arrays else 0
            low, high = max(start - missing, 0), max(stop - missing, 0)
            columns.append([mx.contiguous(array[:, :, low:high]) for array in arrays])
        return self._queued(stop - start, columns)

    @classmethod
    def _queued(cls, length: int, columns: Columns) -> Self:
        # Copy now: a lazy slice would keep the cache of the whole batch, and the next step would have to copy it.
        mx.async_eval(columns)  # type: ignore[no-untyped-call]
        return cls(length, columns)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The recurrent states of a row after a token."""

    states: States

    @classmethod
    def copy_from(cls, cache: KVCache, row: int) -> Self:
        """Copy the states of a row. Queues the copy on the device."""
        states = cache.copy_states(row)
        mx.async_eval(states)  # type: ignore[no-untyped-call]
        return cls(states)

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(array.nbytes for arrays in self.states for array in arrays if array is not None)

    def tensors(self) -> Block:
        """Return the arrays as host memory. They are not copied, so keep the checkpoint as long as they are used.

        An array that the layer does not use is represented by an empty tensor without dimensions.
        """
        return [_UNUSED if array is None else _tensor(array) for arrays in self.states for array in arrays]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], like: Sequence[int]) -> Self:
        """Return the checkpoint of these tensors; the inverse of `tensors`. Copies them.

        Args:
            like: number of arrays by recurrent part.
        """
        arrays = iter([_array(tensor) if tensor.shape else None for tensor in tensors])
        states = [[next(arrays) for _ in range(count)] for count in like]
        mx.async_eval(states)  # type: ignore[no-untyped-call]
        return cls(states)


_UNUSED = Tensor("U32", (), np.zeros(0, np.uint8))


@dataclass(frozen=True, slots=True)
class Layout:
    """What is stored of a model's rows.

    Attributes:
        attention: number of arrays by attention part.
        recurrent: number of arrays by recurrent part.
        windows: sliding window by attention part; None: none.
        token_bytes: bytes of the columns of a token.
        window_bytes: those of layers with a sliding window.
        state_bytes: bytes of the recurrent states of a row.
    """

    model: Any
    attention: tuple[int, ...]
    recurrent: tuple[int, ...]
    windows: tuple[int | None, ...]
    token_bytes: int
    window_bytes: int
    state_bytes: int

    @classmethod
    def of(cls, model: Any) -> Layout | None:
        """Return the layout; None if rows of this model cannot be stored."""
        if not kv_cache.mergeable(model):
            return None
        cache = KVCache.empty(model)
        model(mx.array([[0]], dtype=mx.uint32), cache=cache.layers)
        attention = tuple(len(part.arrays) for part in cache.attention)
        recurrent = tuple(len(part.cache) for part in cache.recurrent)
        windows = tuple(part.window for part in cache.attention)
        sizes = [part.nbytes // part.capacity if part.capacity else 0 for part in cache.attention]
        window_bytes = sum(size for size, window in zip(sizes, windows, strict=True) if window)
        state_bytes = sum(part.nbytes for part in cache.recurrent)
        return cls(model, attention, recurrent, windows, sum(sizes), window_bytes, state_bytes)

    @property
    def window(self) -> int:
        """Longest sliding window; 0 if there is none."""
        return max((window or 0 for window in self.windows), default=0)

    def nbytes(self, length: int) -> int:
        """Return the bytes of a prefix of this many tokens with a checkpoint at its end."""
        return self.token_bytes * length + self.state_bytes

    def thinned_nbytes(self, length: int) -> int:
        """Return the approximate bytes of a thinned prefix; see `is_kept`. At most a quarter of the windows is kept."""
        return self.nbytes(length) - self.window_bytes * max(0, length - self._cuttable) * 3 // 4

    def is_kept(self, start: int, stop: int, end: int) -> bool:
        """Return whether tokens `start` to `stop` of a thinned prefix of `end` tokens keep the columns of windows."""
        interval = max(THINNED_WINDOWS * self.window, CUTTABLE_TOKENS)
        next_cut = (start // interval + 1) * interval
        return stop > end - self._cuttable or stop > next_cut - self.window

    @property
    def _cuttable(self) -> int:
        return max(CUTTABLE_TOKENS, 2 * self.window)

    def usable(self, segments: Sequence[Segment], length: int) -> int:
        """Return how many of the first `length` tokens of consecutive segments a row can take.

        Args:
            segments: they begin with the first token of the sequence and have at least `length` tokens.
        """
        for first, last in reversed(list(_complete_ranges(segments))):
            end = min(last, length)
            if end > first and (first == 0 or end - self.window >= first):
                return end
        return 0

    def row(self, segments: Sequence[Segment], checkpoint: Checkpoint | None, length: int) -> KVCache:
        """Return the cache of one row from segments of which `length` tokens are usable.

        Args:
            checkpoint: the recurrent states after these tokens; None if the model has none.
        """
        columns = _newest(segments, length, [window or length for window in self.windows])
        return kv_cache.row_of(self.model, columns, checkpoint.states if checkpoint else [], length)


def joined(segments: Sequence[Segment], length: int) -> Segment:
    """Return one segment of the first `length` tokens of consecutive segments. Copies them."""
    newest = _newest(segments, length, [length] * len(segments[0].columns))
    columns = [[mx.contiguous(array) for array in arrays] for arrays in newest]
    mx.async_eval(columns)  # type: ignore[no-untyped-call]
    return Segment(length, columns)


def _complete_ranges(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of tokens for which every part has its columns, in order."""
    first = end = 0
    for segment in segments:
        if segment.complete < segment.length:
            if end > first:
                yield first, end
            first = end + segment.length - segment.complete
        end += segment.length
    if end > first:
        yield first, end


def _newest(segments: Sequence[Segment], length: int, wanted: Sequence[int]) -> Columns:
    """Join the columns of the first `length` tokens of consecutive segments.

    Args:
        wanted: by attention part, the number of columns, counted from the last; fewer if some of these are missing.
    """
    excess = sum(segment.length for segment in segments) - length
    return [_newest_of_part(segments, part, excess, count) for part, count in enumerate(wanted)]


def _newest_of_part(segments: Sequence[Segment], part: int, excess: int, wanted: int) -> list[mx.array]:
    chosen: list[list[mx.array]] = []
    for segment in reversed(segments):
        arrays = segment.columns[part]
        present = arrays[0].shape[2] if arrays else 0
        stop = present - excess
        start = max(0, stop - wanted)
        if stop > 0:
            chosen.insert(0, [array[:, :, start:stop] for array in arrays])
            wanted -= stop - start
        excess = max(0, excess - segment.length)
        if not wanted or (not excess and present < segment.length):
            break
    return [mx.concatenate(list(each), axis=2) if len(each) > 1 else each[0] for each in zip(*chosen, strict=True)]


def _tensor(array: mx.array) -> Tensor:
    data = np.frombuffer(memoryview(cast("Any", array)), np.uint8) if array.size else np.zeros(0, np.uint8)
    return Tensor(_TYPES[array.dtype][0], array.shape, data)


def _array(tensor: Tensor) -> mx.array:
    dtype, bits = next((dtype, bits) for dtype, (name, bits) in _TYPES.items() if name == tensor.dtype)
    return mx.array(tensor.data.view(bits).reshape(tensor.shape)).view(dtype)
