"""A cache of image features, for rows that contain the same image again."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeAlias

import mlx.core as mx

from worker.runner.prefix.blocks import key_of

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
        self._used_at: dict[Key, float] = {}
        self._barred: set[str] = set()
        self.nbytes = 0
        self.hits = 0

    def get(self, key: Key) -> mx.array | None:
        """Return the features of an image; None if they are not cached."""
        features = self._features.get(key)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(key)
            self._used_at[key] = time.time()
        return features

    def put(self, key: Key, features: mx.array) -> None:
        """Add features, unless they exceed the limit, have no owner, or have one whose features were all erased."""
        owner, too_large = key[0], features.nbytes > self._max_bytes
        if owner is None or too_large or key in self._features or key_of(owner) in self._barred:
            return
        self._features[key] = features
        self._used_at[key] = time.time()
        self.nbytes += features.nbytes
        self._evict()

    def set_limit(self, max_bytes: int) -> None:
        """Set the maximum bytes and evict features beyond it."""
        self._max_bytes = max_bytes
        self._evict()

    def erase(self, cutoffs: Mapping[str, float]) -> None:
        """Drop the features of owners that were not used after a time, by owner; see `PrefixCache.erase`."""
        self._barred |= {owner for owner, cutoff in cutoffs.items() if cutoff == math.inf}
        for key, used_at in [*self._used_at.items()]:
            if used_at <= cutoffs.get(key_of(key[0] or ""), -math.inf):
                self._drop(key)

    def clear(self) -> None:
        """Drop all features."""
        self._features.clear()
        self._used_at.clear()
        self.nbytes = 0

    def _evict(self) -> None:
        while self.nbytes > self._max_bytes:
            self._drop(next(iter(self._features)))

    def _drop(self, key: Key) -> None:
        self.nbytes -= self._features.pop(key).nbytes
        del self._used_at[key]
