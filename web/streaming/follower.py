"""Follow a job: each event after a cursor exactly once and in order, even if pub/sub loses messages.

The job log is authoritative; the hub only reports new events sooner. The log is read when an event number is missing,
when the hub sends `RESYNC`, and with each heartbeat.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias

import redis

from shared.errors import Gone
from shared.jobs.log import Event, EventKind, JobLog
from shared.redis.client import passes
from web.streaming.hub import Hub, Item, Signal, Subscription

log = logging.getLogger(__name__)

_PAGE: Final = 500
_CHECK_S: Final = 5.0
"""Interval at which `wait` reads the job's record: processes of older versions do not publish the end of a job."""

Watch: TypeAlias = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Makes a context manager that calls a function if the client disconnects inside its block."""


def no_watch(_: Callable[[], None]) -> AbstractContextManager[None]:
    """Watch no client."""
    return nullcontext()


class Follower:
    """Reads the events of jobs."""

    def __init__(self, job_log: JobLog, hub: Hub, heartbeat_s: float) -> None:
        self._log = job_log
        self._hub = hub
        self._heartbeat_s = heartbeat_s

    def follow(self, job_id: str, cursor: int, watch: Watch = no_watch) -> Generator[list[Event]]:
        """Yield the events after number `cursor` until the job has ended. Events that are ready come in one list.

        An empty list means that a heartbeat is due. If the cursor is past the end, only the `done` event comes. If the
        process is shutting down or the client has disconnected, the generator ends without a `done` event.

        Raises:
            Gone: the log was trimmed or has expired. Raised by this call, or later by the generator.
            redis.RedisError: Redis is unavailable. Raised only by this call; the generator waits for Redis instead.
        """
        return self._events(job_id, cursor, self._page(job_id, cursor), watch)

    def wait(self, job_id: str, timeout_s: float | None, linger_s: float = 0.0, watch: Watch = no_watch) -> None:
        """Return when the job has ended, after `timeout_s`, or `linger_s` after the process begins to shut down.

        It also returns when the client disconnects. Without a timeout, the job's deadline bounds the wait. While Redis
        is unavailable, the wait continues.

        Raises:
            redis.RedisError: the job cannot be read, and trying again will not help.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with self._hub.subscribe_end(job_id) as subscription, _wake(subscription, watch):
            while (remaining_s := deadline - time.monotonic()) > 0:
                items = subscription.take(min(remaining_s, _CHECK_S))
                if Signal.ENDED in items or Signal.DISCONNECTED in items:
                    return
                if Signal.CLOSING in items:
                    deadline = min(deadline, time.monotonic() + linger_s)
                if (not items or Signal.RESYNC in items) and self._ended(job_id):
                    return

    def _ended(self, job_id: str) -> bool:
        try:
            return self._log.ended(job_id)
        except redis.RedisError as error:
            if not passes(error):
                raise
            log.warning("job_read_failed", extra={"job_id": job_id, "reason": str(error)})
            return False  # `wait` tries again after the next item or interval

    def _events(self, job_id: str, cursor: int, page: list[Event], watch: Watch) -> Generator[list[Event]]:
        cursor, ended = yield from _yield_new(cursor, page)
        if ended:
            return
        with self._hub.subscribe(job_id) as subscription, _wake(subscription, watch):
            while not ended:
                items = subscription.take(self._heartbeat_s)
                if not items:
                    yield []
                following, read_log = _following(cursor, items)
                if following:
                    yield following
                    cursor, ended = following[-1].n, following[-1].kind is EventKind.DONE
                if read_log and not ended:
                    cursor, ended = yield from self._from_log(job_id, cursor)
                if Signal.CLOSING in items or Signal.DISCONNECTED in items:
                    return

    def _from_log(self, job_id: str, cursor: int) -> Generator[list[Event], None, tuple[int, bool]]:
        """Yield all logged events after the cursor; return the new cursor and whether the job has ended."""
        ended, full = False, True
        while full and not ended:
            try:
                page = self._page(job_id, cursor)
            except redis.RedisError as error:
                # The log is read again after the next event, `RESYNC` or heartbeat.
                log.warning("job_log_read_failed", extra={"job_id": job_id, "reason": str(error)})
                break
            full = len(page) == _PAGE
            cursor, ended = yield from _yield_new(cursor, page)
        return cursor, ended

    def _page(self, job_id: str, cursor: int) -> list[Event]:
        """Return the next events after the cursor; if the cursor is past the end of an ended job, the last event."""
        last = self._log.last(job_id)
        if last is not None and last.n <= cursor:
            return [last] if last.kind is EventKind.DONE else []
        events = self._log.read(job_id, cursor, _PAGE) if last is not None else []
        if not events:
            detail = "The events of this job are no longer stored. GET the job to read its text."
            raise Gone(detail, code="log_expired")
        return events


def _wake(subscription: Subscription, watch: Watch) -> AbstractContextManager[None]:
    return watch(lambda: subscription.put(Signal.DISCONNECTED))


def _following(cursor: int, items: Sequence[Item]) -> tuple[list[Event], bool]:
    """Return the events that continue from the cursor without a gap, and whether the log may have further events."""
    following: list[Event] = []
    for item in items:
        if isinstance(item, Event):
            if item.n == cursor + 1:
                cursor = item.n
                following.append(item)
            elif item.n > cursor or item.kind is EventKind.DONE:
                return following, True
        elif item is Signal.RESYNC:
            return following, True
    return following, not items


def _yield_new(cursor: int, events: list[Event]) -> Generator[list[Event], None, tuple[int, bool]]:
    """Yield the events after the cursor, and `done` in any case; return the new cursor and whether it was `done`."""
    new = [event for event in events if event.n > cursor or event.kind is EventKind.DONE]
    if not new:
        return cursor, False
    yield new
    return new[-1].n, new[-1].kind is EventKind.DONE
