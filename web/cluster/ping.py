"""Response times of workers, measured by a ping through Celery's remote control."""

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
"""How long a ping collects replies."""
_TIMEOUT_S: Final = 0.6
"""Longest time that a caller waits, whatever the broker does."""


class WorkerPing:
    """Measures at most once a second, however many callers there are."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._pending: threading.Event | None = None
        self._measured_at = float("-inf")
        self._response_s: dict[str, float] = {}

    def response_times(self, expected: int) -> dict[str, float]:
        """Return the seconds that each Celery node took to reply. Nodes that did not reply are missing.

        Args:
            expected: number of nodes. When as many have replied, the measurement ends early.
        """
        with self._lock:
            if not expected or time.monotonic() - self._measured_at < _MAX_AGE_S:
                return self._response_s
            done = self._pending
            if done is None:
                done = self._pending = threading.Event()
                threading.Thread(target=self._measure, args=(expected, done), daemon=True).start()
        done.wait(_TIMEOUT_S)
        return self._response_s

    def _measure(self, expected: int, done: threading.Event) -> None:
        response_s: dict[str, float] = {}
        sent_at = time.monotonic()

        def record(reply: dict[str, Any]) -> None:
            for node in reply:
                response_s.setdefault(node, time.monotonic() - sent_at)

        try:
            self._app.control.broadcast("ping", reply=True, timeout=_COLLECT_S, limit=expected, callback=record)
        except (redis.RedisError, OperationalError, OSError) as error:
            log.warning("worker_ping_failed", extra={"reason": str(error)})
        finally:
            with self._lock:
                self._response_s, self._measured_at, self._pending = response_s, time.monotonic(), None
            done.set()
