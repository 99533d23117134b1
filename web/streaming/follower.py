"""A job's events from any cursor on: each once, in order, whatever pub/sub loses.

The log is the truth and the hub only says sooner what is new. When a number is missing, when the hub has doubts,
and with each heartbeat, the log is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from typing import Final

import redis

from shared.errors import Gone
from shared.jobs.log import Event, EventKind, JobLog
from shared.queue.redis import passes
from web.streaming.hub import Hub, Item, Signal

log = logging.getLogger(__name__)

_PAGE: Final = 500
_CHECK_S: Final = 5.0
"""Interval at which a wait reads the job's record, because older processes do not publish ends."""


class Follower:
    """Reads jobs' events as they come."""

    def __init__(self, job_log: JobLog, live: Hub, heartbeat_s: float) -> None:
        self._log = job_log
        self._live = live
        self._heartbeat_s = heartbeat_s

    def follow(self, job_id: str, cursor: int) -> Generator[list[Event]]:
        """The events after number `cursor`, those that are there at once together, until the job's end.

        An empty list when a heartbeat is due. With a cursor past the end only the end comes. It ends without a `done`
        event only when the process is about to end.

        Raises:
            Gone: the log was trimmed or has expired; now, or in mid-stream.
            redis.RedisError: Redis is away now. Once it runs, the stream outlasts that.
        """
        return self._events(job_id, cursor, self._page(job_id, cursor))

    def wait(self, job_id: str, timeout_s: float | None, linger_s: float = 0.0) -> None:
        """Return when the job has ended, when time is over, or `linger_s` after the process is about to end.

        Without a timeout the job's own deadline bounds it. It outlasts Redis being away.

        Raises:
            redis.RedisError: the job cannot be read, and trying again will not help.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with self._live.subscribe_end(job_id) as live:
            while (left_s := deadline - time.monotonic()) > 0:
                items = live.take(min(left_s, _CHECK_S))
                if Signal.ENDED in items:
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
            # As with a stream: whatever comes next leads here again.
            log.warning("job_not_read", extra={"job_id": job_id, "reason": str(error)})
            return False

    def _events(self, job_id: str, cursor: int, page: list[Event]) -> Generator[list[Event]]:
        cursor, ended = yield from _after(cursor, page)
        if ended:
            return
        with self._live.subscribe(job_id) as live:
            while not ended:
                items = live.take(self._heartbeat_s)
                if not items:
                    yield []
                following, doubtful = _sift(cursor, items)
                if following:
                    yield following
                    cursor, ended = following[-1].n, following[-1].kind is EventKind.DONE
                if doubtful and not ended:
                    cursor, ended = yield from self._missed(job_id, cursor)
                if Signal.CLOSING in items:
                    return

    def _missed(self, job_id: str, cursor: int) -> Generator[list[Event], None, tuple[int, bool]]:
        ended, full = False, True
        while full and not ended:
            try:
                page = self._page(job_id, cursor)
            except redis.RedisError as error:
                # Whatever comes next (an event, the hub's return, a heartbeat) leads here again.
                log.warning("job_log_not_read", extra={"job_id": job_id, "reason": str(error)})
                break
            full = len(page) == _PAGE
            cursor, ended = yield from _after(cursor, page)
        return cursor, ended

    def _page(self, job_id: str, cursor: int) -> list[Event]:
        """The next events after the cursor; the last event alone when the cursor is past the end of an ended job."""
        last = self._log.last(job_id)
        if last is not None and last.n <= cursor:
            return [last] if last.kind is EventKind.DONE else []
        events = self._log.read(job_id, cursor, _PAGE) if last is not None else []
        if not events:
            raise Gone("The job's log is not kept any more.", code="log_expired")
        return events


def _sift(cursor: int, items: Sequence[Item]) -> tuple[list[Event], bool]:
    """The events that follow the cursor without a gap, and whether the log may have more than these."""
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


def _after(cursor: int, events: list[Event]) -> Generator[list[Event], None, tuple[int, bool]]:
    """Pass on what is new, and the end in any case; the new cursor, and whether that was the end."""
    new = [event for event in events if event.n > cursor or event.kind is EventKind.DONE]
    if not new:
        return cursor, False
    yield new
    return new[-1].n, new[-1].kind is EventKind.DONE
