"""How fast workers answer: a real ping through Celery's remote control."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Final

import redis
from celery import Celery
from kombu.exceptions import OperationalError

log = logging.getLogger(__name__)

_MAX_AGE_S: Final = 1.0
_COLLECT_S: Final = 0.5
_PATIENCE_S: Final = 0.6
"""Longest time a caller waits, whatever the broker does."""


class WorkerPing:
    """Response times, measured at most once a second however many ask."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._under_way: threading.Event | None = None
        self._taken_at = float("-inf")
        self._response_s: dict[str, float] = {}

    def read(self, expected: int) -> dict[str, float]:
        """Seconds that each Celery node took to answer; one that did not answer is absent.

        Args:
            expected: number of nodes; once as many have answered, nobody waits any longer.
        """
        with self._lock:
            if not expected or time.monotonic() - self._taken_at < _MAX_AGE_S:
                return self._response_s
            measured = self._under_way
            if measured is None:
                measured = self._under_way = threading.Event()
                threading.Thread(target=self._measure, args=(expected, measured), daemon=True).start()
        measured.wait(_PATIENCE_S)
        return self._response_s

    def _measure(self, expected: int, measured: threading.Event) -> None:
        response_s: dict[str, float] = {}
        sent_at = time.monotonic()

        def note(reply: dict[str, Any]) -> None:
            for node in reply:
                response_s.setdefault(node, time.monotonic() - sent_at)

        try:
            self._app.control.broadcast("ping", reply=True, timeout=_COLLECT_S, limit=expected, callback=note)
        except (redis.RedisError, OperationalError, OSError) as error:
            log.warning("workers_not_pinged", extra={"reason": str(error)})
        finally:
            with self._lock:
                self._response_s, self._taken_at, self._under_way = response_s, time.monotonic(), None
            measured.set()
