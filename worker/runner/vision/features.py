"""What the image encoder computed, kept for rows that show the same image again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

import mlx.core as mx

Key: TypeAlias = tuple[str | None, str]
"""Owner and digest."""


class FeatureCache:
    """Features of images; the least recently used are evicted first.

    Args:
        most_bytes: what all may occupy; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Key, mx.array] = OrderedDict()
        self.nbytes = 0
        self.hits = 0

    def get(self, key: Key) -> mx.array | None:
        """What is kept of an image."""
        features = self._kept.get(key)
        if features is not None:
            self.hits += 1
            self._kept.move_to_end(key)
        return features

    def put(self, key: Key, features: mx.array) -> None:
        """Keep it, unless it is too large or has no owner."""
        if key[0] is None or features.nbytes > self._most_bytes or key in self._kept:
            return
        self._kept[key] = features
        self.nbytes += features.nbytes
        self._evict()

    def allow(self, most_bytes: int) -> None:
        """Occupy no more than that from now on."""
        self._most_bytes = most_bytes
        self._evict()

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.nbytes = 0

    def _evict(self) -> None:
        while self.nbytes > self._most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
