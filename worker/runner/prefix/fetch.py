"""Rows that wait until their prefix has been read from disk. Other rows continue meanwhile."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from worker.runner.base import Row
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.spill import Fetch

TIMEOUT_S = 5.0
"""Maximum wait for the disk. After it, the prompt is prefilled without the prefix."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    row: Row
    fetch: Fetch
    deadline: float


class PrefixFetch:
    """Rows with a prefix that is being read from disk.

    Args:
        prefixes: receives the blocks, one per step so that no step takes long.
    """

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._waiting: dict[int, _Waiting] = {}

    def add(self, row: Row) -> bool:
        """Add a row if its prefix is on disk. Returns whether it was added."""
        fetch = self._prefixes.fetch(row.owner, row.prompt[:-1])
        if fetch is not None:
            self._waiting[row.uid] = _Waiting(row, fetch, time.monotonic() + TIMEOUT_S)
        return fetch is not None

    def next_read(self) -> Future[Any] | None:
        """Return the block that the first row waits for."""
        first = next(iter(self._waiting.values()), None)
        return first.fetch.pieces[0].content if first else None

    def ready(self) -> list[Row]:
        """Remove and return the rows with a finished or abandoned read."""
        rows = [waiting.row for waiting in self._waiting.values() if not self._advance(waiting)]
        self.remove([row.uid for row in rows])
        return rows

    def remove(self, uids: Collection[int]) -> None:
        """Remove rows."""
        for uid in uids:
            self._waiting.pop(uid, None)

    def clear(self) -> None:
        """Remove all rows."""
        self._waiting.clear()

    def _advance(self, waiting: _Waiting) -> bool:
        """Add the next block if it has been read. Returns whether the row must still wait."""
        if waiting.fetch.pieces[0].content.done():
            return self._prefixes.add_fetched(waiting.fetch)
        return time.monotonic() < waiting.deadline
