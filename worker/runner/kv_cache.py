"""The cache of a batch: what the model remembers of its rows, in one part per layer.

A part is a `ColumnCache` for attention, or mlx-lm's `ArraysCache` for recurrent layers. This module, `column_cache` and
`kv_segments` alone know how caches are built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.cache import KVCache as AttentionCache

from worker.runner.column_cache import SLACK, ColumnCache, allocated_columns, window_columns
from worker.runner.quantized_cache import QuantizedColumnCache

Columns: TypeAlias = list[list[mx.array]]
"""By attention part: its arrays with the newest tokens of a row, each [1, heads, tokens, size]."""

States: TypeAlias = list[list[mx.array | None]]
"""By recurrent part: its arrays for one row, each [1, ...]."""

GROW_AHEAD = 32
"""Number of free columns at which the layers of a cache start to grow, one after another."""

_LIMITS = ("max_size", "chunk_size", "window_size")
"""Attributes of mlx-lm's caches that limit how many tokens they keep."""


class KVCache:
    """Cached keys, values and states of the rows of a batch.

    Attributes:
        layers: the `cache` argument of the model. If this module does not know how to batch the caches of an
            architecture, mlx-lm's caches of a single sequence.
        parts: the same with the lists of layers that have several parts flattened.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.parts = list(_flat(layers))

    @classmethod
    def empty(cls, model: Any, rows: int = 1) -> Self:
        """Return a cache without tokens."""
        layers = empty_row(model)
        return cls([_batched(layer, rows) for layer in layers] if _batchable(layers) else layers)

    @classmethod
    def of_rows(cls, rows: Sequence[KVCache]) -> KVCache:
        """Return a batch of one or more rows, given as caches of one row each. Copies them if there are several."""
        first, *others = rows
        if others:
            first.extend(*others)
        return first

    @property
    def attention(self) -> list[ColumnCache]:
        """The attention parts."""
        return [part for part in self.parts if isinstance(part, ColumnCache)]

    @property
    def recurrent(self) -> list[Any]:
        """The recurrent parts."""
        return [part for part in self.parts if isinstance(part, ArraysCache)]

    @property
    def columns(self) -> int:
        """The column at which all rows end in the layers that keep every token; 0 if there are none."""
        return max((part.end for part in self._growing), default=0)

    @property
    def states(self) -> list[Any]:
        """The arrays to evaluate in order to fill the cache."""
        return [layer.state for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes that the cache occupies."""
        return sum(layer.nbytes for layer in self.layers)

    def pad(self, lengths: Sequence[int]) -> bool:
        """Prepare the layers for a pass over rows of different lengths, padded on the right.

        Returns:
            Whether any row is padded. If so, call `unpad` after the pass.
        """
        padding = [max(lengths) - length for length in lengths]
        if any(padding):
            for part in self.parts:
                part.prepare(lengths=list(lengths), right_padding=padding)
        return any(padding)

    def unpad(self) -> None:
        """Move the padding of the last pass to the left of each row."""
        for part in self.parts:
            part.finalize()

    def layer_range(self, start: int, stop: int) -> KVCache:
        """Return a cache of some of the layers. It shares them with this cache."""
        return KVCache(self.layers[start:stop])

    def queue(self) -> list[Any]:
        """Start filling the cache on the device. Returns the arrays to evaluate in order to wait for it."""
        filled = self.states
        mx.async_eval(filled)  # type: ignore[no-untyped-call]  # mlx's stub has no types for it
        return filled

    def reserve(self, columns: int, max_layers: int | None = None) -> bool:
        """Allocate columns for a long row at once. Otherwise its cache is copied every few hundred tokens.

        Args:
            max_layers: maximum layers to widen in this call: all layers of a long row take longer than a decode step.

        Returns:
            Whether any layer was widened.
        """
        narrow = [part for part in self._growing if part.capacity < columns][:max_layers]
        for part in narrow:
            part.reserve(columns)
        return bool(narrow)

    def grow_ahead(self) -> None:
        """Widen a few of the layers that are nearly full. Widening all of them would delay the step."""
        near = [part for part in self._growing if 0 < part.capacity - part.end <= GROW_AHEAD]
        for part in near[: -(-len(self.parts) // GROW_AHEAD)]:
            part.reserve(part.capacity + 1)

    def set_columns(self, columns: int) -> None:
        """Set the length of the only row without filling it, to measure the cost of attending to that many tokens."""
        for part in self._growing:
            part.set_end(columns)

    def fit(self) -> None:
        """Free memory that only the prefill needs, and the padding of recurrent layers, which would need a mask."""
        for part in self.attention:
            part.fit()
        for part in self.recurrent:
            if not part.empty():  # the padding of an empty part is its number of rows
                part.left_padding = None

    def extend(self, *others: KVCache) -> None:
        """Append the rows of other caches. Copies all rows."""
        for part, *more in zip(self.parts, *(other.parts for other in others), strict=True):
            if isinstance(part, ColumnCache):
                part.extend(more)
            else:
                for each in more:
                    part.extend(each)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep one or more rows, by batch index, and cut the columns that none of them needs. Copies the rows."""
        for part in self.parts:
            if isinstance(part, ColumnCache):
                part.keep_rows(rows)
            else:
                part.filter(mx.array(list(rows)))

    def overwrite(self, rows: Sequence[int], other: KVCache) -> bool:
        """Replace rows, given by batch index, with the rows of another cache. Does not copy the other rows.

        Returns:
            False if that is impossible, for example because the new rows are longer than the batch.
        """
        pairs = list(zip(self.parts, other.parts, strict=False))
        if not pairs or not all(_fits(part, more) for part, more in pairs):
            return False
        for part, more in pairs:
            if isinstance(part, ColumnCache):
                part.overwrite(rows, more)
            else:
                _overwrite_states(part, rows, more)
        return True

    def trim(self, tokens: Sequence[int]) -> None:
        """Drop the newest `tokens[i]` tokens of row i, at most `SLACK`. Leaves recurrent parts as they are."""
        common, uneven = min(tokens), max(tokens) > min(tokens)
        for part in self.attention:
            part.trim(common)
            if uneven:  # rows end at the same column: a row that loses more tokens is moved there
                part.prepare(right_padding=[each - common for each in tokens])
                part.finalize()
        if uneven:
            mx.eval(self.states)

    def copy_columns(self, row: int, tokens: int) -> Columns:
        """Copy the newest tokens of a row. Of a sliding window, they may be fewer; see `ColumnCache.copy`."""
        return [part.copy(row, tokens) for part in self.attention]

    def copy_states(self, row: int) -> States:
        """Copy the recurrent state of a row."""
        return [
            [None if array is None else mx.contiguous(array[row : row + 1]) for array in part.cache]
            for part in self.recurrent
        ]

    def states_now(self) -> States:
        """Return the recurrent states of all rows. Passes replace these arrays, so they need not be copied."""
        return [list(part.cache) for part in self.recurrent]

    def restore_states(self, states: States) -> None:
        """Restore what `states_now` returned."""
        for part, arrays in zip(self.recurrent, states, strict=True):
            part.cache = list(arrays)

    @property
    def _growing(self) -> list[ColumnCache]:
        """The parts that keep every token, once they have any."""
        return [part for part in self.attention if part.window is None and part.arrays]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Cache memory of a row, by its length.

    Attributes:
        fixed: bytes that do not depend on the length.
        growing: (bytes per token, sliding window in tokens) of groups of layers; None: no window.
    """

    fixed: int
    growing: tuple[tuple[int, int | None], ...]

    @classmethod
    def of(cls, model: Any) -> Footprint:
        """Measure the footprint on one token; of caches that do not show their keys, on more."""
        cache = KVCache.empty(model)
        model(mx.array([[0]], dtype=mx.uint32), cache=cache.layers)
        parts = cache.parts
        if any(not hasattr(part, "keys") and hasattr(part, "offset") for part in parts):
            return cls._by_growth(model, max(window(model), SLACK))
        keyed = [part for part in parts if getattr(part, "keys", None) is not None]
        growing: Counter[int | None] = Counter()
        for part in keyed:
            columns = part.capacity if isinstance(part, ColumnCache) else part.keys.shape[2]
            growing[_limit(part)] += part.nbytes // columns
        fixed = sum(part.nbytes for part in parts if not hasattr(part, "keys"))
        return cls(fixed, tuple((token_bytes, limit) for limit, token_bytes in growing.items()))

    @classmethod
    def _by_growth(cls, model: Any, tokens: int) -> Footprint:
        """Measure what a cache grows by beyond its first `tokens` tokens."""
        cache, sizes = KVCache.empty(model), []
        for _ in range(2):
            model(mx.zeros((1, tokens), dtype=mx.uint32), cache=cache.layers)
            mx.eval(cache.states)
            sizes.append(cache.nbytes)
        token_bytes = -(-(sizes[1] - sizes[0]) // tokens)
        return cls(max(0, sizes[0] - token_bytes * tokens), ((token_bytes, None),))

    def allocated(self, tokens: int) -> int:
        """Return the bytes allocated per row in a batch with a longest row of this many tokens."""
        columns = allocated_columns(tokens + SLACK)
        return self.fixed + sum(
            token_bytes * min(columns, window_columns(limit) if limit else columns)
            for token_bytes, limit in self.growing
        )

    def filled(self, tokens: int) -> int:
        """Return the bytes that a decode step reads for a row of this many tokens."""
        return self.fixed + sum(token_bytes * min(tokens, limit or tokens) for token_bytes, limit in self.growing)

    def padding(self, lengths: Iterable[int]) -> int:
        """Return the bytes of padding that a decode step reads for a batch of rows of these lengths."""
        filled = [self.filled(length) for length in lengths]
        return len(filled) * max(filled, default=0) - sum(filled)


def mergeable(model: Any) -> bool:
    """Return whether several rows of this model can share a cache."""
    return _batchable(empty_row(model))


def kind_of(layer: Any) -> tuple[str, list[int | None]]:
    """Return what tells apart the caches of layers that work differently."""
    return type(layer).__name__, [_limit(part) for part in _flat([layer])]


def window(model: Any) -> int:
    """Return the length of the model's shortest sliding window; 0 if it has none."""
    limits = [_limit(part) for part in _flat(empty_row(model))]
    return min((limit for limit in limits if limit), default=0)


def recurrent(model: Any) -> bool:
    """Return whether any layer has a recurrent state, so that rows cannot be cut at any token."""
    return any(isinstance(part, ArraysCache) for part in _flat(empty_row(model)))


def empty_row(model: Any) -> list[Any]:
    """Return mlx-lm's caches of a single sequence without tokens, one per layer."""
    return list(make_prompt_cache(model))


def row_of(model: Any, columns: Columns, states: States, tokens: int) -> KVCache:
    """Return the cache of one row of `tokens` tokens.

    Args:
        columns: the newest tokens of each attention part: all of them, or at least a window.
        states: the recurrent parts after the last token.
    """
    cache = KVCache.empty(model)
    for part, arrays in zip(cache.attention, columns, strict=True):
        part.hold(arrays, tokens)
    for state, arrays_of_part in zip(cache.recurrent, states, strict=True):
        # Another array object with the same buffer, because a batch writes rows into its arrays.
        state.cache = [None if array is None else mx.contiguous(array) for array in arrays_of_part]
    return cache


def _batchable(layers: Iterable[Any]) -> bool:
    return all(
        type(part) in (AttentionCache, QuantizedKVCache, ArraysCache)
        or (type(part) is RotatingKVCache and not part.keep)
        for part in _flat(layers)
    )


def _batched(layer: Any, rows: int) -> Any:
    """Return the empty batch cache that corresponds to mlx-lm's empty cache of a single sequence."""
    if isinstance(layer, CacheList):
        return CacheList(*(_batched(part, rows) for part in layer.caches))  # type: ignore[no-untyped-call]
    if isinstance(layer, ArraysCache):
        return ArraysCache(len(layer.cache), [0] * rows)
    if isinstance(layer, QuantizedKVCache):
        return QuantizedColumnCache([0] * rows, layer.bits, layer.group_size)
    return ColumnCache([0] * rows, getattr(layer, "max_size", None))


def _limit(part: Any) -> int | None:
    """Return the maximum number of tokens that a layer attends to; None: all."""
    if isinstance(part, ColumnCache):
        return part.window
    return next((int(limit) for name in _LIMITS if (limit := getattr(part, name, None))), None)


def _flat(layers: Iterable[Any]) -> Iterator[Any]:
    """Yield the parts of all layers."""
    for layer in layers:
        if isinstance(layer, CacheList):
            yield from _flat(layer.caches)
        else:
            yield layer


def _fits(part: Any, other: Any) -> bool:
    if isinstance(part, ColumnCache):
        return part.fits(other)
    if not isinstance(part, ArraysCache):
        return False
    pairs: Any = zip(part.cache, other.cache, strict=True)
    return all(one is not None and two is not None and one.shape[1:] == two.shape[1:] for one, two in pairs)


def _overwrite_states(part: Any, rows: Sequence[int], other: Any) -> None:
    for array, more in zip(part.cache, other.cache, strict=True):
        for index, row in enumerate(rows):
            array[row : row + 1] = more[index : index + 1]
