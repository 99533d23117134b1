"""A cache of image features, for rows that contain the same image again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

import mlx.core as mx

Key: TypeAlias = tuple[str | None, str]
"""Owner and digest of an image. Owners do not share features."""


class FeatureCache:
    """Image features; evicts the least recently used first.

    Args:
        max_bytes: maximum bytes of all features; 0: keep none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._features: OrderedDict[Key, mx.array] = OrderedDict()
        self.nbytes = 0
        self.hits = 0

    def get(self, key: Key) -> mx.array | None:
        """Return the features of an image; None if they are not cached."""
        features = self._features.get(key)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(key)
        return features

    def put(self, key: Key, features: mx.array) -> None:
        """Add features, unless they exceed the limit or have no owner."""
        if key[0] is None or features.nbytes > self._max_bytes or key in self._features:
            return
        self._features[key] = features
        self.nbytes += features.nbytes
        self._evict()

    def set_limit(self, max_bytes: int) -> None:
        """Set the maximum bytes and evict features beyond it."""
        self._max_bytes = max_bytes
        self._evict()

    def clear(self) -> None:
        """Drop all features."""
        self._features.clear()
        self.nbytes = 0

    def _evict(self) -> None:
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._features.popitem(last=False)[1].nbytes
