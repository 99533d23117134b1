"""Retries of requests while the service restarts, is full, or limits the rate."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from scripts.client.api import Refused, Unreachable

T = TypeVar("T")

OVERLOADED = 529
"""Status of Anthropic's API for 503."""

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 15.0
MAX_RETRY_AFTER_S = 300.0
"""Upper bound on Retry-After."""
MAX_SERVER_ERRORS = 3
"""Number of responses with status 500 after which a request fails."""


class Stopped(Exception):
    """The run was stopped while a request was waiting."""


class RetriesExhausted(Exception):
    """The service was unreachable for too long. The message is the last error."""


class RetryPolicy:
    """Repeats failed requests. Many threads share one policy: a rate limit pauses all of them."""

    def __init__(
        self, max_outage_s: float, stop: Event, *, on_rate_limited: Callable[[], object] = lambda: None
    ) -> None:
        """Create a policy.

        Args:
            max_outage_s: how long the service may be unreachable at a time.
            stop: ends all waits when it is set.
            on_rate_limited: called when the rate limit delays a request.
        """
        self._max_outage_s = max_outage_s
        self._stop = stop
        self._on_rate_limited = on_rate_limited
        self._paused_until = 0.0

    def call(self, request: Callable[[], T]) -> T:
        """Send a request until it succeeds; return its result.

        Raises:
            Refused: the error is permanent.
            RetriesExhausted: the service was unreachable for `max_outage_s`.
            Stopped: `stop` was set.
        """
        failures = 0
        deadline: float | None = None
        while True:
            self._wait_for_rate_limit()
            try:
                return request()
            except (Refused, Unreachable) as error:
                failures += 1
                if isinstance(error, Refused) and not _is_transient(error, failures):
                    raise
                if _is_queueing(error):
                    deadline = None
                elif deadline is None:
                    deadline = time.monotonic() + self._max_outage_s
                elif time.monotonic() > deadline:
                    raise RetriesExhausted(str(error)) from error
                self._pause(error, failures)

    def _pause(self, error: Refused | Unreachable, failures: int) -> None:
        seconds = _pause_s(error, failures)
        if isinstance(error, Refused) and error.status == 429:
            self._on_rate_limited()
            # The limit applies to the key, so to all threads.
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)
        # Random, so that threads do not retry at the same time.
        self._sleep(seconds * random.uniform(1.0, 1.25))

    def _wait_for_rate_limit(self) -> None:
        while (pause_s := self._paused_until - time.monotonic()) > 0:
            self._sleep(pause_s)
        self._sleep(0)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


def _pause_s(error: Refused | Unreachable, failures: int) -> float:
    if isinstance(error, Refused) and error.retry_after is not None:
        return min(MAX_RETRY_AFTER_S, error.retry_after)
    return min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10))


def _is_queueing(error: Refused | Unreachable) -> bool:
    """Whether the service works but asks to wait. Such waits do not count as an outage."""
    return isinstance(error, Refused) and (error.status == 429 or error.code == "queue_full")


def _is_transient(error: Refused, failures: int) -> bool:
    """Whether the same request may succeed later."""
    return error.status in (429, 502, 503, 504, OVERLOADED) or (error.status == 500 and failures < MAX_SERVER_ERRORS)
