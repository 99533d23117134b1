"""Erases the cached prefixes of API keys that were purged or have deleted jobs, in memory and on disk.

A prefix belongs to an API key, not to a job, because jobs share it. So when a job is deleted, those prefixes of its key
that no job has used since are erased once they have been unused for `UNUSED_S`; those in use stay. Redis has a cutoff
time per key; infinity means that the key was purged. A process that was not running applies all cutoffs when it starts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, Protocol

from shared.redis import keys
from shared.redis.client import Redis
from worker.process.critical import OnDeath, end_process
from worker.queue.lease import PeriodicThread
from worker.runner.prefix.files import erase

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 5.0
UNUSED_S: Final = 600.0
"""A prefix of a key that has deleted jobs is erased only after it was not used for this long."""
SLACK_S: Final = 60.0
"""How far the clocks of Redis and of this machine may differ: all prefixes of a deleted job are still found."""
REPEAT_S: Final = 60.0
"""Interval at which prefixes of keys with deleted jobs are erased until nothing can be left."""


class PrefixOwner(Protocol):
    """A model worker, as far as its prefixes are concerned."""

    id: str

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        """Drop prefixes of owners that were not used after a time, by owner."""
        ...


class PrefixEraser(PeriodicThread):
    """Looks in Redis for new cutoffs.

    Args:
        folder: of all prefix files.
        workers: returns the model workers of this process.
    """

    def __init__(
        self,
        client: Redis,
        folder: Path,
        workers: Callable[[], Collection[PrefixOwner]],
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("prefix-eraser", INTERVAL_S, on_death)
        self._client = client
        self._folder = folder
        self._workers = workers
        self._done: dict[str, float] = {}  # by owner, the cutoff up to which its files have been erased
        self._notified: set[str] = set()  # ids of the workers that know the purged keys
        self._repeat_at = 0.0

    def do(self) -> None:
        """Erase what must be erased by now."""
        wanted: dict[str, float] = dict(self._client.zrange(keys.PREFIX_CUTOFFS, 0, -1, withscores=True))
        purged = {owner: cutoff for owner, cutoff in wanted.items() if cutoff == math.inf}
        new = {owner: cutoff for owner, cutoff in purged.items() if self._done.get(owner) != cutoff}
        if time.monotonic() >= self._repeat_at:
            self._repeat_at = time.monotonic() + REPEAT_S
            unused_since = time.time() - UNUSED_S
            due = {owner: min(cutoff + SLACK_S, unused_since) for owner, cutoff in wanted.items() if cutoff != math.inf}
            new |= {owner: cutoff for owner, cutoff in due.items() if cutoff > self._done.get(owner, -1.0)}
        self._notify(purged, new)
        if new:
            self._erase_files(new)

    def _notify(self, purged: Mapping[str, float], new: Mapping[str, float]) -> None:
        """Pass new cutoffs to all model workers, and all purged keys to those that were loaded since the last round."""
        for worker in self._workers():
            cutoffs = new if worker.id in self._notified else {**purged, **new}
            if cutoffs:
                worker.erase_prefixes(cutoffs)
            self._notified.add(worker.id)

    def _erase_files(self, cutoffs: Mapping[str, float]) -> None:
        try:
            erase(self._folder, cutoffs)
        except OSError as error:
            logger.warning("prefixes_not_erased", extra={"reason": str(error)})
        else:
            self._done |= cutoffs
            logger.info("prefixes_erased", extra={"keys": len(cutoffs)})
