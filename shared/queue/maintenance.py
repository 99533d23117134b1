"""Maintenance, once a second in every API and worker process: recover lost jobs, expire late jobs, adopt old layouts.

The scripts are atomic, so any number of processes may run it at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import redis

from shared.jobs.record import EndedJob
from shared.jobs.store import Jobs
from shared.queue.recovery import Reaper
from shared.queue.wakeups import Notifier
from shared.redis.client import passes

log = logging.getLogger(__name__)

ADOPT_AGAIN_S: Final = 10.0
"""Interval of searches for jobs of the first layout while old workers still run some."""


class Maintenance:
    """Runs maintenance rounds in a thread (a greenlet under gunicorn).

    Args:
        also: called at the end of each round that reached Redis.
        on_ended: called with each job that ended without its worker; None if other processes report these jobs.
    """

    def __init__(
        self,
        reaper: Reaper,
        notifier: Notifier,
        jobs: Jobs,
        also: Callable[[], object] = lambda: None,
        on_ended: Callable[[EndedJob], object] | None = None,
    ) -> None:
        self._reaper = reaper
        self._notifier = notifier
        self._jobs = jobs
        self._also = also
        self._on_ended = on_ended
        self._unreachable = False
        self._adopt_at: float | None = 0.0  # monotonic; None: nothing is left to adopt
        self._stopping = threading.Event()

    def start(self, alive: Callable[[], bool] = lambda: True) -> None:
        """Run rounds in the background while `alive` returns True and until `stop` is called."""
        threading.Thread(target=self._run, args=(alive,), name="maintenance", daemon=True).start()

    def stop(self) -> None:
        """Stop after the current round."""
        self._stopping.set()

    def round(self) -> None:
        """Run one round. Errors are logged; the next round continues where this one failed."""
        try:
            self._notifier.wake(self._reaper.reap())
            self._adopt()
            self._report_ends()
            self._also()
        except redis.RedisError as error:
            if not passes(error):
                log.exception("maintenance_failed")
            elif not self._unreachable:
                log.warning("maintenance_paused", extra={"reason": str(error)})
            self._unreachable = True
        except Exception:
            log.exception("maintenance_failed")
        else:
            self._unreachable = False

    def _adopt(self) -> None:
        if self._adopt_at is None or time.monotonic() < self._adopt_at:
            return
        left = self._jobs.adopt_old_layout()
        if not left:
            self._jobs.drop_old_layout()
        self._adopt_at = time.monotonic() + ADOPT_AGAIN_S if left else None

    def _report_ends(self) -> None:
        if self._on_ended is not None:
            for job in self._reaper.take_ends():
                self._on_ended(job)

    def _run(self, alive: Callable[[], bool]) -> None:
        while alive() and not self._stopping.is_set():
            self.round()
            self._stopping.wait(self._reaper.rest_s)
