"""Rows that have come and wait for what disk has of their prompts; the others go on in the meantime."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import wait
from dataclasses import dataclass

from worker.runner.base import Row
from worker.runner.prefix_cache import PrefixCache
from worker.runner.spill import Fetch

PATIENCE_S = 5.0
"""A disk that takes longer is not waited for: the prompt is read instead."""
_PAUSE_S = 0.02
"""How long a step that has nothing else to do waits for the disk."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    row: Row
    fetch: Fetch
    until: float


class Arrivals:
    """Rows on their way to `worker.runner.prefill`.

    Args:
        prefixes: into which the blocks go, one a step, so that no step takes long.
    """

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._waiting: dict[int, _Arrival] = {}

    def add(self, row: Row) -> bool:
        """Take a row in, if disk has something for it; whether it has."""
        fetch = self._prefixes.fetch(row.owner, row.prompt[:-1])
        if fetch is not None:
            self._waiting[row.uid] = _Arrival(row, fetch, time.monotonic() + PATIENCE_S)
        return fetch is not None

    def ready(self, *, idle: bool) -> list[Row]:
        """Those whose prefixes are in memory now, or will not be.

        Args:
            idle: there is nothing else to do, so it may wait for the disk a moment.
        """
        if idle and self._waiting:
            wait([next(iter(self._waiting.values())).fetch.blocks[0][1]], _PAUSE_S)
        rows = [arrival.row for arrival in self._waiting.values() if not self._advance(arrival)]
        self.remove([row.uid for row in rows])
        return rows

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        for uid in uids:
            self._waiting.pop(uid, None)

    def clear(self) -> None:
        """Drop all of them."""
        self._waiting.clear()

    def _advance(self, arrival: _Arrival) -> bool:
        """Take in a block of this row that has been read; whether there is more to wait for."""
        if arrival.fetch.blocks[0][1].done():
            return self._prefixes.place(arrival.fetch)
        return time.monotonic() < arrival.until
