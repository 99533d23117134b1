"""The KV cache of a batch. This module alone knows the internals of mlx-lm's cache classes.

A column of a cache holds the keys and values of one token per row. All rows of a batch cache end at the same column;
shorter rows are padded on the left. A row that joins a batch, or takes the batch index of a row that has ended, must
therefore be moved to that column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, CacheList, make_prompt_cache
from mlx_lm.models.cache import KVCache as AttentionCache

RowCache: TypeAlias = list[Any]
"""The cache of one row outside any batch: mlx-lm's single-sequence caches, one per layer."""

Columns: TypeAlias = list[tuple[mx.array, mx.array]]
"""Keys and values of consecutive tokens of one row, per layer, each [1, heads, tokens, head size]."""

GROW_AHEAD = 32
"""Number of free columns at which the layers of a cache start to grow, one after another."""

GROWTH_COLUMNS = 256
"""Caches are allocated in multiples of this number of columns."""

SLACK = 64
"""Unused columns that a cache may keep. Without them it would soon grow, and be copied, again."""

_LIMITS = ("max_size", "chunk_size", "window_size")
"""Attributes of mlx-lm's caches that limit how many tokens they keep."""


class KVCache:
    """Cached keys, values and states of the rows of a batch.

    Attributes:
        layers: the `cache` argument of the model: one of mlx-lm's batch caches per layer. If mlx-lm has none for this
            architecture, the single-sequence caches of one row.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    @classmethod
    def empty(cls, model: Any, rows: int = 1) -> Self:
        """Return a cache without tokens."""
        return cls.of_rows([empty_row(model) for _ in range(rows)])

    @classmethod
    def of_rows(cls, rows: Sequence[RowCache]) -> Self:
        """Return a batch of one or more rows. Copies them, except for a single row of plain attention."""
        if len(rows) == 1 and all(type(layer) is AttentionCache and layer.keys is not None for layer in rows[0]):
            return cls([_as_batch(layer) for layer in rows[0]])
        if len(rows) == 1 and not _mergeable(rows[0]):
            return cls(list(rows[0]))
        return cls(_merged(rows))

    @property
    def columns(self) -> int:
        """The column at which all rows end. For plain attention only."""
        return _end(self.layers[0])

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
            for layer in self.layers:
                layer.prepare(lengths=list(lengths), right_padding=padding)
        return any(padding)

    def unpad(self) -> None:
        """Move the padding of the last pass to the left of each row."""
        for layer in self.layers:
            layer.finalize()

    def layer_range(self, start: int, stop: int) -> KVCache:
        """Return a cache of some of the layers. It shares them with this cache."""
        return KVCache(self.layers[start:stop])

    def queue(self) -> list[Any]:
        """Start filling the cache on the device. Returns the arrays to evaluate in order to wait for it."""
        filled = self.states
        mx.async_eval(filled)  # type: ignore[no-untyped-call]  # mlx's stub has no types for it
        return filled

    def reserve(self, columns: int, max_layers: int | None = None) -> bool:
        """Allocate columns for a long row at once. Otherwise its cache is copied every `GROWTH_COLUMNS` tokens.

        Args:
            max_layers: maximum layers to widen in this call: all layers of a long row take longer than a decode step.

        Returns:
            Whether any layer was widened.
        """
        narrow = [layer for layer in self.layers if _filled(layer) and layer.keys.shape[2] < columns][:max_layers]
        for layer in narrow:
            _widen(layer, allocated_columns(columns) - layer.keys.shape[2])
        return bool(narrow)

    def grow_ahead(self) -> None:
        """Widen a few of the layers that are nearly full. Widening all of them would delay the step."""
        near = [
            layer for layer in self.layers if _filled(layer) and 0 < layer.keys.shape[2] - _end(layer) <= GROW_AHEAD
        ]
        for layer in near[: -(-len(self.layers) // GROW_AHEAD)]:
            _widen(layer, GROWTH_COLUMNS)

    def set_columns(self, columns: int) -> None:
        """Set the length of the only row without filling it, to measure the cost of attending to that many tokens."""
        for layer in filter(_filled, self.layers):
            _end_at(layer, columns)

    def extend(self, other: KVCache) -> None:
        """Append the rows of another cache. Copies both caches."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.extend(more)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep one or more rows, by batch index, and cut the columns that none of them needs. Copies the rows."""
        for layer in self.layers:
            layer.filter(list(rows))
            if _filled(layer) and layer.keys.shape[2] > (limit := allocated_columns(_end(layer) + SLACK)):
                layer.keys, layer.values = layer.keys[:, :, :limit], layer.values[:, :, :limit]

    def overwrite(self, rows: Sequence[int], other: KVCache) -> bool:
        """Replace rows, given by batch index, with the rows of another cache. Does not copy the other rows.

        Returns:
            False if that is impossible: a layer is not plain attention, or the new rows are longer than the batch.
        """
        pairs = list(zip(self.layers, other.layers, strict=False))
        if not pairs or not all(_filled(one) and _filled(two) and _end(two) <= _end(one) for one, two in pairs):
            return False
        indices = mx.array(list(rows))
        for layer, more in pairs:
            end, length = _end(layer), _end(more)
            for i, row in enumerate(rows):
                layer.keys[row : row + 1, :, end - length : end] = more.keys[i : i + 1, :, :length]
                layer.values[row : row + 1, :, end - length : end] = more.values[i : i + 1, :, :length]
            layer.offset[indices] = more.offset
            layer.left_padding[indices] = more.left_padding + (end - length)
        return True

    def trim(self, tokens: Sequence[int]) -> None:
        """Drop the newest `tokens[i]` tokens of row i. For plain attention only."""
        common, uneven = min(tokens), max(tokens) > min(tokens)
        for layer in self.layers:
            layer.trim(common)
            if uneven:  # rows end at the same column: a row that loses more tokens is moved there
                layer.prepare(right_padding=[each - common for each in tokens])
                layer.finalize()
        if uneven:
            mx.eval(self.states)

    def copy_columns(self, row: int, start: int, stop: int) -> Columns:
        """Copy tokens `start` to `stop` of a row that has `stop` tokens. For plain attention only."""
        return [copied(layer.keys, layer.values, row, _end(layer) - stop + start, _end(layer)) for layer in self.layers]

    def copy_row(self, row: int) -> RowCache:
        """Copy the whole cache of a row. Queues the copy on the device."""
        layers = [layer.extract(row) for layer in self.layers]
        for layer in layers:
            layer.state = tree_map(_owned, layer.state)
        mx.async_eval([layer.state for layer in layers])  # type: ignore[no-untyped-call]
        return layers


@dataclass(frozen=True, slots=True)
class Footprint:
    """Cache memory of a row, by its length.

    Attributes:
        fixed: bytes that do not depend on the length.
        growing: (bytes per token, maximum tokens) of groups of layers; None: no maximum.
    """

    fixed: int
    growing: tuple[tuple[int, int | None], ...]

    @classmethod
    def of(cls, model: Any) -> Footprint:
        """Measure the footprint on one token; of caches that do not show their keys, on more."""
        cache = KVCache.empty(model)
        model(mx.array([[0]], dtype=mx.uint32), cache=cache.layers)
        parts = _flat(cache.layers)
        if any(not hasattr(part, "keys") and hasattr(part, "offset") for part in parts):
            return cls._by_growth(model, max(window(model), SLACK))
        keyed = [part for part in parts if getattr(part, "keys", None) is not None]
        growing: Counter[int | None] = Counter()
        for part in keyed:
            growing[_limit(part)] += part.nbytes // part.keys.shape[2]
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
        # A sliding window also holds the chunk that is being processed.
        return self.fixed + sum(
            token_bytes * min(columns, limit + GROWTH_COLUMNS if limit else columns)
            for token_bytes, limit in self.growing
        )

    def filled(self, tokens: int) -> int:
        """Return the bytes that a decode step reads for a row of this many tokens."""
        return self.fixed + sum(token_bytes * min(tokens, limit or tokens) for token_bytes, limit in self.growing)

    def padding(self, lengths: Iterable[int]) -> int:
        """Return the bytes of padding that a decode step reads for a batch of rows of these lengths."""
        filled = [self.filled(length) for length in lengths]
        return len(filled) * max(filled, default=0) - sum(filled)


def allocated_columns(columns: int) -> int:
    """Return the number of columns that a cache allocates to use this many."""
    return -(-columns // GROWTH_COLUMNS) * GROWTH_COLUMNS


def mergeable(model: Any) -> bool:
    """Return whether several rows of this model can share a cache."""
    return _mergeable(empty_row(model))


def kind_of(layer: Any) -> tuple[str, list[int | None]]:
    """Return what tells apart the caches of layers that work differently."""
    return type(layer).__name__, [_limit(part) for part in _flat([layer])]


def window(model: Any) -> int:
    """Return the length of the model's shortest sliding window; 0 if it has none."""
    limits = [_limit(part) for part in _flat(empty_row(model))]
    return min((limit for limit in limits if limit), default=0)


def plain(model: Any) -> bool:
    """Return whether every layer is plain attention: a key and a value per token, so rows can be cut at any token."""
    return all(type(layer) is AttentionCache for layer in empty_row(model))


def extractable(model: Any) -> bool:
    """Return whether the cache of a single row can be copied out of a batch."""
    return all(hasattr(part, "extract") for part in _flat(KVCache.empty(model).layers))


def empty_row(model: Any) -> RowCache:
    """Return the cache of one row without tokens."""
    return list(make_prompt_cache(model))


def row_of_columns(columns: Columns, length: int) -> RowCache:
    """Return the cache of one row of `length` tokens with these keys and values."""
    layers = []
    for keys, values in columns:
        layer = AttentionCache()  # type: ignore[no-untyped-call]
        layer.keys, layer.values, layer.offset = keys, values, length
        layers.append(layer)
    return layers


def row_nbytes(row: RowCache) -> int:
    """Return the bytes of a row's cache."""
    return sum(layer.nbytes for layer in row)


def copied(keys: mx.array, values: mx.array, row: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Copy columns `start` to `stop` of a row into new buffers."""
    return _owned(keys[row : row + 1, :, start:stop]), _owned(values[row : row + 1, :, start:stop])


def _owned(part: Any) -> Any:
    """Copy an array, because a slice keeps the whole array that it was cut from in memory."""
    return mx.contiguous(part) if isinstance(part, mx.array) else part


def _merged(rows: Sequence[RowCache]) -> list[Any]:
    return [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]


def _mergeable(row: RowCache) -> bool:
    return all(hasattr(layer, "merge") for layer in row)


def _limit(part: Any) -> int | None:
    """Return the maximum number of tokens that a cache keeps; None: all."""
    return next((int(limit) for name in _LIMITS if (limit := getattr(part, name, None))), None)


def _as_batch(layer: AttentionCache) -> BatchKVCache:
    batch = BatchKVCache([0])
    batch.keys, batch.values = layer.keys, layer.values
    _end_at(batch, layer.offset)
    return batch


def _flat(layers: Iterable[Any]) -> list[Any]:
    """Return the caches of all layers, with the lists of layers that have several flattened."""
    return [part for layer in layers for part in (_flat(layer.caches) if isinstance(layer, CacheList) else [layer])]


def _filled(layer: Any) -> bool:
    """Return whether a layer is plain attention and has tokens."""
    return type(layer) is BatchKVCache and layer.keys is not None


def _end(layer: Any) -> int:
    """Return the column at which the rows of a batch cache end."""
    return int(layer._idx)  # noqa: SLF001 - no public name


def _end_at(layer: Any, columns: int) -> None:
    """Set the column at which the only row of a batch cache ends."""
    layer.offset = mx.array([columns])
    layer._idx = columns  # noqa: SLF001 - no public name


def _widen(layer: Any, columns: int) -> None:
    layer.keys, layer.values = (_widened(each, columns) for each in (layer.keys, layer.values))


def _widened(array: mx.array, columns: int) -> mx.array:
    return mx.concatenate([array, mx.zeros((*array.shape[:2], columns, array.shape[3]), array.dtype)], axis=2)
