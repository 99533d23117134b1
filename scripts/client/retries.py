"""How often and how long a request is tried again: the service may be restarting, full, or limiting us."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from scripts.client.api import Refused, Unreachable

T = TypeVar("T")

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 15.0
LONGEST_RETRY_AFTER_S = 300.0
"""Whatever Retry-After says."""
FAULTS = 3
"""An internal error may be a passing one; after as many it is the answer."""


class Stopped(Exception):
    """The run ends; what waits is to give up."""


class GaveUp(Exception):
    """The service stayed away for longer than we wait; the message says with what."""


class Patience:
    """Tries calls again for many threads at once."""

    def __init__(self, longest_s: float, stop: Event, *, on_limited: Callable[[], object] = lambda: None) -> None:
        """Bear an absence of `longest_s` at a time, until `stop` is set.

        `on_limited` is called whenever the rate limit holds us up.
        """
        self._longest_s = longest_s
        self._stop = stop
        self._on_limited = on_limited
        self._open_at = 0.0

    def call(self, request: Callable[[], T]) -> T:
        """The request's result.

        Raises:
            Refused: with an answer that trying again does not change.
            GaveUp: the service was away for too long.
            Stopped: the run ends.
        """
        failures = 0
        give_up_at: float | None = None
        while True:
            self._pass_gate()
            try:
                return request()
            except (Refused, Unreachable) as error:
                failures += 1
                if isinstance(error, Refused) and not _passing(error, failures):
                    raise
                if _in_turn(error):
                    give_up_at = None
                elif give_up_at is None:
                    give_up_at = time.monotonic() + self._longest_s
                elif time.monotonic() > give_up_at:
                    raise GaveUp(str(error)) from error
                self._pause(error, failures)

    def _pause(self, error: Refused | Unreachable, failures: int) -> None:
        seconds = _pause_s(error, failures)
        if isinstance(error, Refused) and error.status == 429:
            self._on_limited()
            # The limit is the key's: every thread has reached it.
            self._open_at = max(self._open_at, time.monotonic() + seconds)
        # Not all threads at the same moment.
        self._sleep(seconds * random.uniform(1.0, 1.25))

    def _pass_gate(self) -> None:
        while (closed_s := self._open_at - time.monotonic()) > 0:
            self._sleep(closed_s)
        self._sleep(0)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


def _pause_s(error: Refused | Unreachable, failures: int) -> float:
    if isinstance(error, Refused) and error.retry_after is not None:
        return min(LONGEST_RETRY_AFTER_S, error.retry_after)
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10))


def _in_turn(error: Refused | Unreachable) -> bool:
    """Whether the service is well and only asks us to wait, which may take as long as it takes."""
    return isinstance(error, Refused) and (error.status == 429 or error.code == "queue_full")


def _passing(error: Refused, failures: int) -> bool:
    """Whether the same request may be answered otherwise later."""
    return error.status in (429, 502, 503, 504) or (error.status == 500 and failures < FAULTS)
