"""Key-value caches of several rows, one entry a layer, as mlx-lm's batch caches hold them.

In such a cache all rows end at the same place and shorter ones are padded on the left, so a row can only be put
beside others, or over one that has ended, when it is moved to that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache, make_prompt_cache

from worker.runner.base import Row

Layers: TypeAlias = list[Any]

AHEAD = 32
"""Tokens before a cache is full at which its layers begin to grow, one after the other."""


class Placed(NamedTuple):
    """What stands for the image tokens of a row, some of whose tokens, from the one at `start` on, are read."""

    media: Any
    start: int


def placed(row: Row, start: int) -> Placed | None:
    """For the tokens of a row from `start` on; None when all are text."""
    return None if row.media is None else Placed(row.media, start)


def shifts(rows: Sequence[Row | None]) -> dict[str, mx.array]:
    """What a model must be told beside the tokens of these rows, behind their prompts; None: a row that has ended."""
    if not any(row is not None and row.media is not None for row in rows):
        return {}
    return {"shifts": mx.array([row.media.shift if row is not None and row.media else 0 for row in rows])}


def batchable(model: Any) -> bool:
    """Whether several rows of this model can share a cache."""
    return all(hasattr(layer, "merge") for layer in single(model))


def trimmable(model: Any) -> bool:
    """Whether the newest tokens can be taken out of this model's cache again: plain attention only."""
    return all(type(layer) is BatchKVCache for layer in empty(model, 1))


def single(model: Any) -> Layers:
    """A cache for one row, not yet a batch, with nothing in it."""
    return list(make_prompt_cache(model))


def empty(model: Any, rows: int) -> Layers:
    """A cache for so many rows, with nothing in it."""
    return merge([single(model) for _ in range(rows)])


def merge(singles: Sequence[Layers]) -> Layers:
    """A cache of several rows out of caches of one row each. Copies them."""
    return [layers[0].merge(list(layers)) for layers in zip(*singles, strict=True)]


def alone(layers: Layers) -> Layers:
    """A cache of several rows that has only this one. Copies nothing of plain keys and values."""
    if not all(type(layer) is KVCache and layer.keys is not None for layer in layers):
        return merge([layers])
    return [_batch_of(layer) for layer in layers]


def _batch_of(layer: KVCache) -> BatchKVCache:
    batch = BatchKVCache([0])
    batch.keys, batch.values = layer.keys, layer.values
    _end_at(batch, layer.offset)
    return batch


def flat(layers: Iterable[Any]) -> Layers:
    """The caches themselves, where a layer has several."""
    return [part for layer in layers for part in (flat(layer.caches) if isinstance(layer, CacheList) else [layer])]


def put(model: Any, layers: Layers, tokens: Sequence[Sequence[int]], media: Sequence[Placed | None] = ()) -> None:
    """Put tokens of each row through the model; rows may differ in length. Nothing is computed before `states` are.

    Args:
        media: of each row, what its image tokens stand for; none where no row has any.
    """
    longest = max(map(len, tokens))
    if longest == 0:
        return
    padding = [longest - len(row) for row in tokens]
    if any(padding):
        for layer in layers:
            layer.prepare(lengths=[len(row) for row in tokens], right_padding=padding)
    padded = [[*row, *[0] * pad] for row, pad in zip(tokens, padding, strict=True)]
    more = {"media": media} if any(media) else {}
    model(mx.array(padded, dtype=mx.uint32), cache=layers, **more)
    if any(padding):
        for layer in layers:
            layer.finalize()


def feed(model: Any, layers: Layers, tokens: Sequence[Sequence[int]], media: Sequence[Placed | None] = ()) -> list[Any]:
    """Put tokens through the model, as `put`, and queue that on the device; what to evaluate in order to wait."""
    put(model, layers, tokens, media)
    return queue(layers)


def queue(layers: Layers) -> list[Any]:
    """Have the device fill these, without waiting for it; what to evaluate in order to wait."""
    filled = states(layers)
    mx.async_eval(filled)  # type: ignore[no-untyped-call]  # mlx's stub has no types for it
    return filled


def reserve(layers: Layers, columns: int, most: int | None = None) -> bool:
    """Make place for rows of that length at once, where caches would grow and be copied every few hundred tokens.

    Args:
        most: layers that are widened in this call, at most: those of a long row take longer than a decode step.

    Returns:
        Whether there was something to do.
    """
    narrow = [layer for layer in layers if _filled(layer) and layer.keys.shape[2] < columns][:most]
    for layer in narrow:
        _widen(layer, -(-columns // layer.step) * layer.step - layer.keys.shape[2])
    return bool(narrow)


def grow_ahead(layers: Layers) -> None:
    """Make place in a few of the layers that will soon need it: all in the same step would make it far longer."""
    near = [layer for layer in layers if _filled(layer) and 0 < layer.keys.shape[2] - _end(layer) <= AHEAD]
    for layer in near[: -(-len(layers) // AHEAD)]:
        _widen(layer, layer.step)


def pretend(layers: Layers, columns: int) -> None:
    """Let caches of one row, with place for it, say that they have so many tokens: to measure what those cost."""
    for layer in filter(_filled, layers):
        _end_at(layer, columns)


def _end(layer: Any) -> int:
    """Where the rows of a batch cache end."""
    return int(layer._idx)  # noqa: SLF001 - there is no public name for it


def _end_at(layer: Any, columns: int) -> None:
    """Let the only row of a batch cache end there."""
    layer.offset = mx.array([columns])
    layer._idx = columns  # noqa: SLF001 - as in `_end`


def _widen(layer: Any, more: int) -> None:
    layer.keys, layer.values = (_widened(each, more) for each in (layer.keys, layer.values))


def _widened(array: mx.array, columns: int) -> mx.array:
    return mx.concatenate([array, mx.zeros((*array.shape[:2], columns, array.shape[3]), array.dtype)], axis=2)


def states(layers: Layers) -> list[Any]:
    """What to evaluate to have the cache filled."""
    return [layer.state for layer in layers]


def extend(layers: Layers, others: Layers) -> None:
    """Put other rows behind these. Copies both."""
    for layer, other in zip(layers, others, strict=True):
        layer.extend(other)


def keep(layers: Layers, rows: Sequence[int]) -> None:
    """Keep these rows (at least one) and cut the padding that no row needs any more. Copies them."""
    for layer in layers:
        layer.filter(list(rows))


def overwrite(layers: Layers, rows: Sequence[int], others: Layers) -> bool:
    """Put other rows in the places of these, without copying the rest.

    Returns:
        Whether it could be done: the rows must be plain attention caches, and not be longer than the batch is.
    """
    if not all(_fits(layer, other) for layer, other in zip(layers, others, strict=True)):
        return False
    places = mx.array(list(rows))
    for layer, other in zip(layers, others, strict=True):
        end, length = _end(layer), _end(other)
        for i, row in enumerate(rows):
            layer.keys[row : row + 1, :, end - length : end] = other.keys[i : i + 1, :, :length]
            layer.values[row : row + 1, :, end - length : end] = other.values[i : i + 1, :, :length]
        layer.offset[places] = other.offset
        layer.left_padding[places] = other.left_padding + (end - length)
    return True


def _fits(layer: Any, other: Any) -> bool:
    return bool(_filled(layer) and _filled(other) and _end(other) <= _end(layer))


def _filled(layer: Any) -> bool:
    """Whether it has plain keys and values, and some."""
    plain = type(layer) is BatchKVCache
    return bool(plain and layer.keys is not None)


def take_back(layers: Layers, tokens: Sequence[int]) -> None:
    """Take so many of its newest tokens out of each row; the model must be `trimmable`."""
    least = min(tokens)
    for layer in layers:
        layer.trim(least)
        if max(tokens) > least:  # rows end at the same place: the others are moved there
            layer.prepare(right_padding=[each - least for each in tokens])
            layer.finalize()
    if max(tokens) > least:
        mx.eval(states(layers))


def columns(layers: Layers) -> int:
    """Where all rows end, in a cache of plain attention."""
    return _end(layers[0])


def nbytes(layers: Layers) -> int:
    """Bytes that it occupies."""
    return sum(layer.nbytes for layer in layers)
