"""Prefix caches in tests: caches that write to a folder, and helpers that fill and read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.runner import forward
from worker.runner.kv_cache import KVCache
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.files import SUFFIX, PrefixFiles
from worker.runner.prefix.spill import Spill

PLENTY = 2**30


class CacheFactory:
    """Creates prefix caches over one folder, each like that of a worker."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        self._model = model
        self._spills: list[Spill] = []

    def __call__(
        self, max_bytes: int = PLENTY, disk_bytes: int = PLENTY, max_pending: int = PLENTY // 8
    ) -> PrefixCache:
        spill = Spill(PrefixFiles(self.folder, "model", disk_bytes, 1e6), max_pending)
        spill.open()
        self._spills.append(spill)
        return PrefixCache(self._model, max_bytes + max_pending, spill)

    def on_disk(self) -> int:
        """Return the number of blocks on disk."""
        return len(list(self.folder.rglob("*" + SUFFIX)))

    def close(self) -> None:
        """Stop all writing threads."""
        for spill in self._spills:
            spill.close(10)


def counting(start: int, length: int) -> list[int]:
    """Return tokens below 64 that differ for each start."""
    return [(start + i * 7 + i // 64) % 64 for i in range(length)]


def filled(model: Any, *prompts: Sequence[int]) -> KVCache:
    """Return a batch cache that holds these prompts."""
    cache = KVCache.empty(model, len(prompts))
    forward.fill(model, cache, prompts)
    return cache


def store(cache: PrefixCache, model: Any, tokens: Sequence[int], owner: str = "me") -> None:
    """Store the cache of a row with these tokens."""
    cache.store(owner, tokens, filled(model, tokens), 0)


def fetch_all(cache: PrefixCache, tokens: Sequence[int], owner: str = "me") -> int:
    """Read these tokens from disk. Returns how many of them are in memory then."""
    fetch = cache.fetch(owner, tokens)
    while fetch is not None:
        fetch.pieces[0].content.result(10)
        if not cache.add_fetched(fetch):
            break
    return cache.length(owner, tokens)
