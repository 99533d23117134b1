"""Calls of the model: run tokens through all layers into a cache, with the content of image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from worker.runner.adapters.layers import applied
from worker.runner.base import Row
from worker.runner.kv_cache import KVCache


class PlacedMedia(NamedTuple):
    """The media of a row, for a pass over its tokens from index `start` on."""

    media: Any
    start: int


def placed(row: Row, start: int) -> PlacedMedia | None:
    """Return the media for a pass over a row's tokens from index `start` on; None if all tokens are text."""
    return None if row.media is None else PlacedMedia(row.media, start)


def fill(
    model: Any,
    cache: KVCache,
    input_ids: Sequence[Sequence[int]],
    media: Sequence[PlacedMedia | None] = (),
    shifts: Mapping[str, mx.array] | None = None,
    slots: mx.array | None = None,
) -> mx.array | None:
    """Run the next tokens of each row through the model into the cache. Lazy: evaluate the cache to compute them.

    Args:
        input_ids: by row; lengths may differ.
        media: by row; empty if no row has any.
        shifts: see `shifts`.
        slots: see `slots`.

    Returns:
        The logits, padded on the right; None if no row has a token.
    """
    lengths = [len(row) for row in input_ids]
    longest = max(lengths)
    if not longest:
        return None
    uneven = cache.pad(lengths)
    padded = [[*row, *[0] * (longest - len(row))] for row in input_ids]
    media_arguments = {"media": media} if any(media) else {}
    tokens = mx.array(padded, dtype=mx.uint32)
    with applied(slots):
        logits: mx.array = model(tokens, cache=cache.layers, **media_arguments, **(shifts or {}))
    if uneven:
        cache.unpad()
    return logits


def shifts(rows: Sequence[Row | None]) -> dict[str, mx.array]:
    """Return the additional keyword arguments of a decode step for models with images.

    Args:
        rows: by batch index; None: empty.
    """
    by_row = [row.media.shift if row is not None and row.media is not None else 0 for row in rows]
    return {"shifts": mx.array(by_row)} if any(by_row) else {}


def slots(rows: Sequence[Row | None]) -> mx.array | None:
    """Return the adapter slot of each row of a pass; None if no row has an adapter.

    Args:
        rows: by batch index; None: empty.
    """
    return slot_array([row.adapter_slot if row is not None else 0 for row in rows])


def slot_array(slots: Sequence[int]) -> mx.array | None:
    """Return adapter slots as an array; None if all are 0."""
    return mx.array(list(slots), dtype=mx.uint32) if any(slots) else None
