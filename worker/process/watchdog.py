"""What is under way must get on: judged by what it gains, not by whether its thread lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from time import monotonic
from typing import Final, NamedTuple

from worker.process.critical import OnDeath, VitalThread, end_process

TICK_S: Final = 0.25
_MOST_TICK_S: Final = 2 * TICK_S


class Sign(NamedTuple):
    """Something under way: a value that changes whenever it gains something, and how long it may stay the same."""

    value: float
    patience_s: float


Signs = Mapping[Hashable, Sign]


class Watchdog(VitalThread):
    """Tells what has gained nothing for too long, and when the time to end is over.

    Only the time in which this process runs counts: one that was stopped, or whose machine slept, has not stood still.

    Args:
        look: what is under way now.
        on_stuck: told what is stuck; should end the process.
        on_late: called when the process should have ended by itself.

    Attributes:
        tripped: whether something is stuck; from then on the lease must not be renewed, whatever else hangs.
    """

    def __init__(
        self,
        look: Callable[[], Signs],
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
        """The process is to be gone by then. May be called in a signal handler."""
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
        """See what has changed since the last check, so many seconds ago."""
        signs = self._look()
        self._still = {key: self._aged(key, sign, passed_s) for key, sign in signs.items()}
        stuck = [key for key, (_, still_s) in self._still.items() if still_s > signs[key].patience_s]
        if stuck:
            self.tripped = True
            self._on_stuck(stuck)
        if monotonic() > self._end_by:
            self._on_late()

    def _aged(self, key: Hashable, sign: Sign, passed_s: float) -> tuple[float, float]:
        value, still_s = self._still.get(key, (None, 0.0))
        return sign.value, still_s + passed_s if value == sign.value else 0.0
