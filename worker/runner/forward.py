"""Calls of the model: run tokens through all layers into a cache, with the content of image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

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
) -> mx.array | None:
    """Run the next tokens of each row through the model into the cache. Lazy: evaluate the cache to compute them.

    Args:
        input_ids: by row; lengths may differ.
        media: by row; empty if no row has any.
        shifts: see `shifts`.

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
    logits: mx.array = model(mx.array(padded, dtype=mx.uint32), cache=cache.layers, **media_arguments, **(shifts or {}))
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
