"""Ends a process in which a task makes no progress, also while its thread is alive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from time import monotonic
from typing import Final, NamedTuple

from worker.process.critical import CriticalThread, OnDeath, end_process

TICK_S: Final = 0.25
_MOST_TICK_S: Final = 2 * TICK_S


class Progress(NamedTuple):
    """A task's progress: a value that changes with it, and how long the value may stay the same."""

    value: float
    limit_s: float


ProgressByTask = Mapping[Hashable, Progress]


class Watchdog(CriticalThread):
    """Reports tasks that have made no progress for too long, and a drain that takes too long.

    Only the time in which this process runs counts: not that in which it was stopped, or its machine slept.

    Args:
        look: the tasks under way now.
        on_stuck: called with the stuck tasks; should end the process.
        on_late: called when the process should have ended by itself.

    Attributes:
        tripped: whether a task is stuck; from then on the lease must not be renewed.
    """

    def __init__(
        self,
        look: Callable[[], ProgressByTask],
        on_stuck: Callable[[list[Hashable]], object],
        on_late: Callable[[], object],
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("watchdog", on_death)
        self.tripped = False
        self._look = look
        self._on_stuck = on_stuck
        self._on_late = on_late
        self._still: dict[Hashable, tuple[float, float]] = {}
        self._end_by = float("inf")
        self._ended = threading.Event()

    def end_within(self, seconds: float) -> None:
        """The process must have ended by then. Safe in a signal handler."""
        self._end_by = min(self._end_by, monotonic() + seconds)

    def stop(self) -> None:
        """End the thread soon."""
        self._ended.set()

    def work(self) -> None:
        """Check every so often until stopped."""
        checked_at = monotonic()
        while not self._ended.wait(TICK_S):
            now = monotonic()
            self.check(min(now - checked_at, _MOST_TICK_S))
            checked_at = now

    def check(self, passed_s: float) -> None:
        """Compare with the last check, `passed_s` seconds ago."""
        tasks = self._look()
        self._still = {key: self._aged(key, progress, passed_s) for key, progress in tasks.items()}
        stuck = [key for key, (_, still_s) in self._still.items() if still_s > tasks[key].limit_s]
        if stuck:
            self.tripped = True
            self._on_stuck(stuck)
        if monotonic() > self._end_by:
            self._on_late()

    def _aged(self, key: Hashable, progress: Progress, passed_s: float) -> tuple[float, float]:
        value, still_s = self._still.get(key, (None, 0.0))
        return progress.value, still_s + passed_s if value == progress.value else 0.0
