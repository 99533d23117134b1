"""The keys and values that one attention layer caches for the rows of a batch.

A column holds the keys and values of one token per row. All rows end at the same column; shorter rows are padded on
the left. A row that joins a batch, or takes the batch index of a row that has ended, must therefore be moved to that
column.

A layer with a sliding window drops columns that no later token attends to. The columns that remain are in the order of
the tokens, so rows can be cut, stored and joined in the same way with and without a window. mlx-lm's
`BatchRotatingKVCache` overwrites the oldest column instead, and after that a row can no longer be shortened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import dynamic_roll

GROWTH_COLUMNS = 256
"""Caches are allocated in multiples of this number of columns."""

SLACK = 64
"""Unused columns that a cache may keep. Without them it would soon grow, and be copied, again. A window keeps as many
columns in addition, so that rejected draft tokens can be removed."""

NO_SPAN = -1
"""In `ColumnCache.spans`: a token that attends only to the tokens before it."""

PREFILL_SLACK = SLACK + GROWTH_COLUMNS
"""Columns that a window keeps in addition during the prefill, until they are stored as a prefix."""

WINDOW_ROOM = GROWTH_COLUMNS - SLACK
"""Minimum number of free columns after a window was copied to the front of its arrays."""


class ColumnCache:
    """The cache of one layer, as mlx-lm's models use it.

    Args:
        left_padding: by row, the number of columns of padding.
        window: number of tokens that a token attends to, itself included; None: all.

    Attributes:
        keys, values: [rows, heads, columns, head size]; None before the first token.
        offset: by row, the number of tokens.
        left_padding: by row; negative if columns of the row were dropped.
        end: the column at which all rows end.
        slack: number of columns that are kept in addition to the window.
        spans: [rows, tokens] of the next pass: tokens with the same number attend to each other, also to later ones, at
            any distance; None: no token attends to later ones.
    """

    def __init__(self, left_padding: Sequence[int], window: int | None = None) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.left_padding = mx.array(list(left_padding))
        self.offset = mx.array([-padding for padding in left_padding])
        self.window = window
        self.end = 0
        self.slack = PREFILL_SLACK
        self.spans: mx.array | None = None
        self._dropped = False
        self._first_complete = 0  # if columns were dropped: columns before this one may be missing in some rows
        self._first_visible = 0
        self._padded = any(padding > 0 for padding in left_padding)
        self._right_padding: Sequence[int] | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, with columns as the third dimension; empty before the first token."""
        return [] if self.keys is None else [self.keys, self.values]

    @arrays.setter
    def arrays(self, arrays: Sequence[mx.array]) -> None:
        self.keys, self.values = arrays

    @property
    def capacity(self) -> int:
        """Number of allocated columns."""
        return int(self.arrays[0].shape[2]) if self.arrays else 0

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate in order to fill the cache."""
        return [*self.arrays, self.offset, self.left_padding]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Append columns, and return those that the new tokens may attend to."""
        new, count = self._encoded(keys, values), keys.shape[2]
        self._make_room(new, count)
        start, self.end = self.end, self.end + count
        for array, columns in zip(self.arrays, new, strict=True):
            array[:, :, start : self.end] = columns
        self.offset = self.offset + count
        self._first_visible = self._visible_from(start)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """Return the columns that the newest tokens may attend to."""
        return self._visible(self.keys), self._visible(self.values)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> mx.array | None:  # noqa: N803 - mlx-lm's names
        """Return which of the columns that `update_and_fetch` returns each of the next `N` tokens attends to.

        None: all of them. With a mask, a step takes about 10 more operations, and a GPU cannot use its faster kernels.
        """
        if N == 1 and not self._padded and not return_array and window_size in (None, self.window):
            return None
        first = self._visible_from(self.end)
        mask: mx.array = create_causal_mask(
            N, self.end - first, window_size or self.window, left_padding=self.left_padding - first
        )
        return mask if self.spans is None else mask | _within_spans(self.spans, self.end - first)

    def prepare(self, *, right_padding: Sequence[int], lengths: Sequence[int] | None = None) -> None:  # noqa: ARG002
        """Announce a pass over rows that are padded on the right."""
        self._right_padding = right_padding if max(right_padding) else None

    def finalize(self) -> None:
        """Move the padding of the last pass to the left of each row."""
        padding, self._right_padding = self._right_padding, None
        if padding is None:
            return
        shifts = mx.array(list(padding))
        self.arrays = [dynamic_roll(array, shifts[:, None], axis=2) for array in self.arrays]  # type: ignore[no-untyped-call]
        self.offset = self.offset - shifts
        self.left_padding = self.left_padding + shifts
        self._padded = True
        if self._dropped:
            self._first_complete += max(padding)

    def trim(self, tokens: int) -> None:
        """Drop the newest tokens of every row."""
        self.end -= tokens
        self.offset = self.offset - tokens

    def copy(self, row: int, tokens: int) -> list[mx.array]:
        """Copy the newest tokens of a row into new arrays: `tokens`, or fewer if a window has dropped some."""
        start = max(self.end - tokens, self._first_complete if self._dropped else 0)
        return [mx.contiguous(array[row : row + 1, :, start : self.end]) for array in self.arrays]

    def hold(self, arrays: Sequence[mx.array], tokens: int) -> None:
        """Fill the cache of a single row.

        Args:
            arrays: the newest tokens: all of them, or at least a window.
            tokens: number of tokens of the row.
        """
        if arrays:
            self.arrays = list(arrays)
        self.end = self.capacity
        self.offset, self.left_padding = mx.array([tokens]), mx.array([self.end - tokens])
        self._dropped = self.end < tokens

    def set_end(self, columns: int) -> None:
        """Set the length of the only row without filling it."""
        self.offset, self.end = mx.array([columns]), columns

    def reserve(self, columns: int) -> None:
        """Allocate at least this many columns."""
        if (missing := allocated_columns(columns) - self.capacity) > 0:
            self._widen(missing)

    def fit(self) -> None:
        """Free columns that decoding will not need: those before the window, and most of the unused ones."""
        self.slack = SLACK
        self._drop_old()
        if self.capacity > (limit := allocated_columns(self.end + SLACK)):
            self.arrays = [array[:, :, :limit] for array in self.arrays]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep rows, by batch index, and cut the columns that none of them needs. Copies the rows."""
        indices = mx.array(list(rows))
        self.offset, self.left_padding = self.offset[indices], self.left_padding[indices]
        least, most = cast("list[int]", mx.stack([self.left_padding.min(), self.left_padding.max()]).tolist())
        unused = max(0, least)
        self._padded = most > unused
        if self.arrays:
            self.arrays = [array[indices][:, :, unused:] for array in self.arrays]
        self._move(-unused)
        self.fit()

    def extend(self, others: Sequence[ColumnCache]) -> None:
        """Append the rows of other caches. Copies all rows."""
        caches = [self, *others]
        for cache in caches:
            cache._drop_old()  # noqa: SLF001
        end, capacity = max(cache.end for cache in caches), max(cache.capacity for cache in caches)
        like = next((cache.arrays for cache in caches if cache.arrays), [])
        parts = [cache._justified(like, end, max(capacity, end)) for cache in caches]  # noqa: SLF001
        for cache in caches:
            cache._move(end - cache.end)  # noqa: SLF001
        if like:
            self.arrays = [mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)]
        self.offset = mx.concatenate([cache.offset for cache in caches])
        self.left_padding = mx.concatenate([cache.left_padding for cache in caches])
        self._padded = any(cache._padded for cache in caches)  # noqa: SLF001
        self._take_first_complete(others)

    def fits(self, other: ColumnCache) -> bool:
        """Return whether `overwrite` can write the rows of another cache."""
        return bool(self.arrays) and bool(other.arrays) and other.end <= self.end

    def overwrite(self, rows: Sequence[int], other: ColumnCache) -> None:
        """Replace rows, given by batch index, with the rows of a cache that `fits`. Does not copy other rows."""
        start = self.end - other.end
        for array, more in zip(self.arrays, other.arrays, strict=True):
            for index, row in enumerate(rows):
                array[row : row + 1, :, start : self.end] = more[index : index + 1, :, : other.end]
        other._move(start)
        indices = mx.array(list(rows))
        self.offset[indices] = other.offset
        self.left_padding[indices] = other.left_padding
        self._padded |= other._padded
        self._take_first_complete([other])

    def _encoded(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        return [keys, values]

    def _visible(self, arrays: Any) -> Any:
        return arrays[:, :, self._first_visible : self.end]

    def _visible_from(self, column: int) -> int:
        """Return the first column that the token at a column attends to."""
        return 0 if self.window is None else max(0, column - self.window + 1)

    def _make_room(self, new: Sequence[mx.array], count: int) -> None:
        if not self.arrays:
            shape = allocated_columns(count)
            self.arrays = [mx.zeros((*each.shape[:2], shape, each.shape[3]), each.dtype) for each in new]
        elif self.end + count > self.capacity:
            self._drop_old()
            spare = self.end + count - self.capacity
            if self._dropped and self.window is not None:
                spare = max(spare, window_columns(self.window, self.slack) - self.capacity)
                self._widen(spare)
            else:
                self._widen(allocated_columns(spare))

    def _drop_old(self) -> None:
        """Drop the columns that no later token attends to, but `slack` of them."""
        excess = 0 if self.window is None else self.end - self.window - self.slack
        if excess > 0:
            self.arrays = [array[:, :, excess : self.end] for array in self.arrays]
            self._dropped = True
            self._move(-excess)

    def _move(self, columns: int) -> None:
        """Account for columns that were inserted, or removed if negative, before all others."""
        self._padded |= columns > 0
        self.end += columns
        self.left_padding = self.left_padding + columns
        self._first_complete = max(0, self._first_complete + columns)

    def _take_first_complete(self, others: Sequence[ColumnCache]) -> None:
        dropped = [cache for cache in (self, *others) if cache._dropped]  # noqa: SLF001
        self._first_complete = max((cache._first_complete for cache in dropped), default=0)  # noqa: SLF001
        self._dropped = bool(dropped)

    def _justified(self, like: Sequence[mx.array], end: int, capacity: int) -> list[mx.array]:
        """Return the arrays with the rows moved to column `end`, in `capacity` columns."""
        rows, left = self.offset.shape[0], end - self.end
        arrays = self.arrays or [mx.zeros((rows, each.shape[1], 0, each.shape[3]), each.dtype) for each in like]
        cut = [array[:, :, : capacity - left] for array in arrays]
        return [mx.pad(each, [(0, 0), (0, 0), (left, capacity - left - each.shape[2]), (0, 0)]) for each in cut]

    def _widen(self, columns: int) -> None:
        self.arrays = [_widened(array, columns) for array in self.arrays]


def allocated_columns(columns: int) -> int:
    """Return the number of columns that a cache allocates to use this many."""
    return -(-columns // GROWTH_COLUMNS) * GROWTH_COLUMNS


def window_columns(window: int, slack: int = SLACK) -> int:
    """Return the maximum number of columns that a layer with a sliding window allocates while rows decode."""
    return max(allocated_columns(window + slack), window + slack + WINDOW_ROOM)


def _within_spans(spans: mx.array, before: int) -> mx.array:
    """Return [rows, 1, tokens, columns]: whether two tokens of a pass have the same span.

    Args:
        before: number of columns before the pass.
    """
    same = (spans[:, :, None] == spans[:, None]) & (spans[:, :, None] != NO_SPAN)
    return mx.pad(same, [(0, 0), (0, 0), (before, 0)])[:, None]


def _widened(array: mx.array, columns: int) -> mx.array:
    return mx.concatenate([array, mx.zeros((*array.shape[:2], columns, array.shape[3]), array.dtype)], axis=2)
