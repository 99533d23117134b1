"""Ends a process in which some task makes no progress although its thread is alive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from time import monotonic
from typing import Final, NamedTuple

from worker.process.critical import CriticalThread, OnDeath, end_process

TICK_S: Final = 0.25
_MAX_TICK_S: Final = 2 * TICK_S
"""Longest time that counts between two checks. While the process was stopped or the machine slept, no task could
make progress."""


class Progress(NamedTuple):
    """A task's progress: a value that changes with it, and the longest time for which the value may stay the same."""

    value: float
    limit_s: float


ProgressByTask = Mapping[Hashable, Progress]


class Watchdog(CriticalThread):
    """Reports tasks without progress, and a drain that takes too long.

    Args:
        read_tasks: returns the tasks under way.
        on_stuck: called with the stuck tasks; should end the process.
        on_overdue: called when the process has not ended by the time set with `end_within`.

    Attributes:
        tripped: whether a task is stuck. From then on the lease must not be renewed.
    """

    def __init__(
        self,
        read_tasks: Callable[[], ProgressByTask],
        on_stuck: Callable[[list[Hashable]], object],
        on_overdue: Callable[[], object],
        on_death: OnDeath = end_process,
    ) -> None:
        super().__init__("watchdog", on_death)
        self.tripped = False
        self._read_tasks = read_tasks
        self._on_stuck = on_stuck
        self._on_overdue = on_overdue
        self._seen: dict[Hashable, tuple[float, float]] = {}  # the last value, and for how long it has been the same
        self._end_by = float("inf")
        self._stopped = threading.Event()

    def end_within(self, seconds: float) -> None:
        """Call `on_overdue` if the process still runs after `seconds`. Safe in a signal handler."""
        self._end_by = min(self._end_by, monotonic() + seconds)

    def stop(self) -> None:
        """End the thread after its current check."""
        self._stopped.set()

    def work(self) -> None:
        """Check periodically until stopped."""
        checked_at = monotonic()
        while not self._stopped.wait(TICK_S):
            now = monotonic()
            self.check(min(now - checked_at, _MAX_TICK_S))
            checked_at = now

    def check(self, elapsed_s: float) -> None:
        """Compare the tasks with the last check, `elapsed_s` seconds ago."""
        tasks = self._read_tasks()
        self._seen = {key: self._compared(key, progress, elapsed_s) for key, progress in tasks.items()}
        stuck = [key for key, (_, unchanged_s) in self._seen.items() if unchanged_s > tasks[key].limit_s]
        if stuck:
            self.tripped = True
            self._on_stuck(stuck)
        if monotonic() > self._end_by:
            self._on_overdue()

    def _compared(self, key: Hashable, progress: Progress, elapsed_s: float) -> tuple[float, float]:
        value, unchanged_s = self._seen.get(key, (None, 0.0))
        return progress.value, unchanged_s + elapsed_s if value == progress.value else 0.0
