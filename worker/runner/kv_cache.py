"""The KV cache of a batch, one entry per layer, and everything that is known here of mlx-lm's cache classes.

In a batch cache all rows end at the same column and shorter rows are padded on the left. So a row can join others, or
take the place of one that has ended, only when it is moved to that column.
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
"""The cache of one row outside any batch: mlx-lm's single caches, one per layer."""

Columns: TypeAlias = list[tuple[mx.array, mx.array]]
"""Keys and values of a run of tokens of one row, per layer: [1, heads, tokens, width]."""

GROW_AHEAD = 32
"""Free columns at which the layers of a cache start to grow, one after another."""

COLUMNS = 256
"""Columns by which caches grow."""

SLACK = 64
"""Unused columns that a cache may keep: cutting them would make it grow, and be copied, again soon."""


class KVCache:
    """Cached keys, values and states of several rows.

    Attributes:
        layers: for the model's call: one of mlx-lm's batch caches per layer.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    @classmethod
    def empty(cls, model: Any, rows: int = 1) -> Self:
        """A cache without tokens."""
        return cls(_merged([empty_row(model) for _ in range(rows)]))

    @classmethod
    def of_rows(cls, rows: Sequence[RowCache]) -> Self:
        """A batch of these rows, at least one. Copies them; plain keys and values of a single row are taken over."""
        if len(rows) == 1 and all(type(layer) is AttentionCache and layer.keys is not None for layer in rows[0]):
            return cls([_as_batch(layer) for layer in rows[0]])
        return cls(_merged(rows))

    @property
    def columns(self) -> int:
        """The column at which all rows end; plain attention only."""
        return _end(self.layers[0])

    @property
    def states(self) -> list[Any]:
        """What to evaluate to have the cache filled."""
        return [layer.state for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return sum(layer.nbytes for layer in self.layers)

    def pad(self, lengths: Sequence[int]) -> bool:
        """Announce tokens of different lengths, padded on the right; whether `unpad` is to follow them."""
        padding = [max(lengths) - length for length in lengths]
        if any(padding):
            for layer in self.layers:
                layer.prepare(lengths=list(lengths), right_padding=padding)
        return any(padding)

    def unpad(self) -> None:
        """Move the padding that was announced to the left of each row."""
        for layer in self.layers:
            layer.finalize()

    def part(self, start: int, stop: int) -> KVCache:
        """Some of the layers; they are shared with this cache."""
        return KVCache(self.layers[start:stop])

    def queue(self) -> list[Any]:
        """Have the device fill the cache, without waiting; returns what to evaluate in order to wait."""
        filled = self.states
        mx.async_eval(filled)  # type: ignore[no-untyped-call]  # mlx's stub has no types for it
        return filled

    def reserve(self, columns: int, most_layers: int | None = None) -> bool:
        """Allocate columns at once; otherwise a cache grows, and is copied, every few hundred tokens.

        Args:
            most_layers: layers to widen in this call: those of a long row take longer than a decode step.

        Returns:
            Whether there was something to do.
        """
        narrow = [layer for layer in self.layers if _filled(layer) and layer.keys.shape[2] < columns][:most_layers]
        for layer in narrow:
            _widen(layer, width(columns) - layer.keys.shape[2])
        return bool(narrow)

    def grow_ahead(self) -> None:
        """Widen a few of the layers that are nearly full: all in the same step would make it far longer."""
        near = [
            layer for layer in self.layers if _filled(layer) and 0 < layer.keys.shape[2] - _end(layer) <= GROW_AHEAD
        ]
        for layer in near[: -(-len(self.layers) // GROW_AHEAD)]:
            _widen(layer, COLUMNS)

    def pretend(self, columns: int) -> None:
        """Pretend that the only row has this many tokens, to measure the cost of attending to them."""
        for layer in filter(_filled, self.layers):
            _end_at(layer, columns)

    def extend(self, other: KVCache) -> None:
        """Add the rows of another cache behind these. Copies both."""
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.extend(more)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, at least one, and cut columns that none of them needs. Copies them."""
        for layer in self.layers:
            layer.filter(list(rows))
            if _filled(layer) and layer.keys.shape[2] > (most := width(_end(layer) + SLACK)):
                layer.keys, layer.values = layer.keys[:, :, :most], layer.values[:, :, :most]

    def overwrite(self, rows: Sequence[int], other: KVCache) -> bool:
        """Put the rows of another cache in the places of these, without copying the rest.

        Returns:
            Whether that was possible: it takes plain attention, and rows that are no longer than this cache is wide.
        """
        pairs = list(zip(self.layers, other.layers, strict=False))
        if not pairs or not all(_filled(one) and _filled(two) and _end(two) <= _end(one) for one, two in pairs):
            return False
        places = mx.array(list(rows))
        for layer, more in pairs:
            end, length = _end(layer), _end(more)
            for i, row in enumerate(rows):
                layer.keys[row : row + 1, :, end - length : end] = more.keys[i : i + 1, :, :length]
                layer.values[row : row + 1, :, end - length : end] = more.values[i : i + 1, :, :length]
            layer.offset[places] = more.offset
            layer.left_padding[places] = more.left_padding + (end - length)
        return True

    def trim(self, tokens: Sequence[int]) -> None:
        """Drop the newest `tokens[i]` tokens of row i; the model must be `plain`."""
        least, most = min(tokens), max(tokens)
        for layer in self.layers:
            layer.trim(least)
            if most > least:  # rows end at the same column: those that lose more are moved there
                layer.prepare(right_padding=[each - least for each in tokens])
                layer.finalize()
        if most > least:
            mx.eval(self.states)

    def read_columns(self, row: int, start: int, stop: int) -> Columns:
        """Copy what plain attention holds of tokens `start` to `stop` of a row that has `stop` tokens."""
        return [copied(layer.keys, layer.values, row, _end(layer) - stop + start, _end(layer)) for layer in self.layers]

    def read_row(self, row: int) -> RowCache:
        """Copy all that the layers hold of a row."""
        taken = [layer.extract(row) for layer in self.layers]
        for layer in taken:
            layer.state = tree_map(_owned, layer.state)
        mx.async_eval([layer.state for layer in taken])  # type: ignore[no-untyped-call]
        return taken


@dataclass(frozen=True, slots=True)
class Footprint:
    """Cache memory of a row, by its length.

    Attributes:
        fixed: bytes whatever the length.
        growing: (bytes per token, most tokens) of layers; None: no limit.
    """

    fixed: int
    growing: tuple[tuple[int, int | None], ...]

    @classmethod
    def of(cls, model: Any) -> Footprint:
        """Measured on one token."""
        cache = KVCache.empty(model)
        model(mx.array([[0]], dtype=mx.uint32), cache=cache.layers)
        parts = _flat(cache.layers)
        keyed = [part for part in parts if getattr(part, "keys", None) is not None]
        growing: Counter[int | None] = Counter()
        for part in keyed:
            growing[getattr(part, "max_size", None)] += part.nbytes // part.keys.shape[2]
        fixed = sum(part.nbytes for part in parts if not hasattr(part, "keys"))
        return cls(fixed, tuple((each, most) for most, each in growing.items()))

    def allocated(self, tokens: int) -> int:
        """Bytes of a row in a batch whose longest row has this many tokens."""
        columns = width(tokens + SLACK)
        # A sliding window holds the chunk that is being processed beside its own tokens.
        return self.fixed + sum(each * min(columns, most + COLUMNS if most else columns) for each, most in self.growing)

    def filled(self, tokens: int) -> int:
        """Bytes that a decode step reads for a row with this many tokens."""
        return self.fixed + sum(each * min(tokens, most or tokens) for each, most in self.growing)

    def padding(self, lengths: Iterable[int]) -> int:
        """Bytes of padding that a decode step reads where rows of these lengths share a batch."""
        filled = [self.filled(length) for length in lengths]
        return len(filled) * max(filled, default=0) - sum(filled)


def width(columns: int) -> int:
    """Allocated columns of a cache that uses this many."""
    return -(-columns // COLUMNS) * COLUMNS


def batchable(model: Any) -> bool:
    """Whether several rows of this model can share a cache."""
    return all(hasattr(layer, "merge") for layer in empty_row(model))


def plain(model: Any) -> bool:
    """Whether every layer is plain attention: a key and a value for each token, so rows can be cut at any token."""
    return all(type(layer) is AttentionCache for layer in empty_row(model))


def extractable(model: Any) -> bool:
    """Whether the cache of a row can be taken out of a batch."""
    return all(hasattr(layer, "extract") for layer in _flat(KVCache.empty(model).layers))


def empty_row(model: Any) -> RowCache:
    """The cache of one row, without tokens."""
    return list(make_prompt_cache(model))


def row_of_columns(columns: Columns, length: int) -> RowCache:
    """The cache of one row with these keys and values."""
    layers = []
    for keys, values in columns:
        layer = AttentionCache()  # type: ignore[no-untyped-call]
        layer.keys, layer.values, layer.offset = keys, values, length
        layers.append(layer)
    return layers


def row_nbytes(row: RowCache) -> int:
    """Bytes that a row's cache occupies."""
    return sum(layer.nbytes for layer in row)


def copied(keys: mx.array, values: mx.array, row: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
    """Copies of some columns of a row, with buffers of their own."""
    return _owned(keys[row : row + 1, :, start:stop]), _owned(values[row : row + 1, :, start:stop])


def _owned(part: Any) -> Any:
    """A copy: a mere slice would keep all of what it was cut from."""
    return mx.contiguous(part) if isinstance(part, mx.array) else part


def _merged(rows: Sequence[RowCache]) -> list[Any]:
    return [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]


def _as_batch(layer: AttentionCache) -> BatchKVCache:
    batch = BatchKVCache([0])
    batch.keys, batch.values = layer.keys, layer.values
    _end_at(batch, layer.offset)
    return batch


def _flat(layers: Iterable[Any]) -> list[Any]:
    """The caches themselves, where a layer has several."""
    return [part for layer in layers for part in (_flat(layer.caches) if isinstance(layer, CacheList) else [layer])]


def _filled(layer: Any) -> bool:
    """Whether a layer is plain attention and has tokens."""
    return type(layer) is BatchKVCache and layer.keys is not None


def _end(layer: Any) -> int:
    """The column at which the rows of a batch cache end."""
    return int(layer._idx)  # noqa: SLF001 - there is no public name for it


def _end_at(layer: Any, columns: int) -> None:
    """Let the only row of a batch cache end there."""
    layer.offset = mx.array([columns])
    layer._idx = columns  # noqa: SLF001 - as in `_end`


def _widen(layer: Any, more: int) -> None:
    layer.keys, layer.values = (_widened(each, more) for each in (layer.keys, layer.values))


def _widened(array: mx.array, columns: int) -> mx.array:
    return mx.concatenate([array, mx.zeros((*array.shape[:2], columns, array.shape[3]), array.dtype)], axis=2)
