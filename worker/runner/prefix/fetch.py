"""Rows that wait for the part of their prompt that is on disk. Other rows continue meanwhile."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from worker.runner.base import Row
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.spill import Fetch

PATIENCE_S = 5.0
"""Longest wait for the disk; after that the prompt is prefilled instead."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    row: Row
    fetch: Fetch
    until: float


class PrefixFetch:
    """Rows on their way to `worker.runner.prefill`.

    Args:
        prefixes: to which the blocks are added, one a step, so that no step takes long.
    """

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._waiting: dict[int, _Waiting] = {}

    def add(self, row: Row) -> bool:
        """Take a row in, if disk has something for it; whether it has."""
        fetch = self._prefixes.fetch(row.owner, row.prompt[:-1])
        if fetch is not None:
            self._waiting[row.uid] = _Waiting(row, fetch, time.monotonic() + PATIENCE_S)
        return fetch is not None

    def next_read(self) -> Future[Any] | None:
        """The block that the first row waits for."""
        first = next(iter(self._waiting.values()), None)
        return first.fetch.blocks[0][1] if first else None

    def ready(self) -> list[Row]:
        """Take out the rows whose prefixes are in memory now, or will not be."""
        rows = [waiting.row for waiting in self._waiting.values() if not self._advance(waiting)]
        self.remove([row.uid for row in rows])
        return rows

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        for uid in uids:
            self._waiting.pop(uid, None)

    def clear(self) -> None:
        """Drop all of them."""
        self._waiting.clear()

    def _advance(self, waiting: _Waiting) -> bool:
        """Add a block that has been read; whether there is more to wait for."""
        if waiting.fetch.blocks[0][1].done():
            return self._prefixes.place(waiting.fetch)
        return time.monotonic() < waiting.until
