"""Calls of the model: tokens through all layers into a cache, with what image tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from worker.runner.base import Row
from worker.runner.kv_cache import KVCache


class PlacedMedia(NamedTuple):
    """What the image tokens of a row stand for, where its tokens from `start` on are processed."""

    media: Any
    start: int


def placed(row: Row, start: int) -> PlacedMedia | None:
    """The media of a row's tokens from `start` on; None when all tokens are text."""
    return None if row.media is None else PlacedMedia(row.media, start)


def fill(model: Any, cache: KVCache, tokens: Sequence[Sequence[int]], media: Sequence[PlacedMedia | None] = ()) -> None:
    """Put tokens of each row through the model into the cache. Nothing is computed before the cache is evaluated.

    Args:
        tokens: of each row; lengths may differ.
        media: of each row; empty where no row has any.
    """
    lengths = [len(row) for row in tokens]
    longest = max(lengths)
    if not longest:
        return
    uneven = cache.pad(lengths)
    padded = [[*row, *[0] * (longest - len(row))] for row in tokens]
    more = {"media": media} if any(media) else {}
    model(mx.array(padded, dtype=mx.uint32), cache=cache.layers, **more)
    if uneven:
        cache.unpad()


def shifts(rows: Sequence[Row | None]) -> dict[str, mx.array]:
    """Arguments beside the tokens that the model needs after the prompts of these rows; None: a place without a row."""
    if not any(row is not None and row.media is not None for row in rows):
        return {}
    return {"shifts": mx.array([row.media.shift if row is not None and row.media else 0 for row in rows])}
