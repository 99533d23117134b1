"""HTTP responses that stream a job's events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Final, Self

import redis
from flask import Response

from shared.errors import MlxqError, Unavailable
from shared.jobs.log import Event, EventKind
from web.http.stream_formats import Format
from web.metrics import Metrics
from web.results.job_views import urls

log = logging.getLogger(__name__)

STREAM_HEADERS: Final = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}

_COUNTED_TOGETHER = 32
"""Chunks after which the counter is updated. Updating a counter that processes share costs as much as a chunk."""


def stream_response(
    events: Generator[list[Event]], form: Format, job_id: str, ended_job: Callable[[], str], metrics: Metrics
) -> Response:
    """Respond with a job's events, as they arrive.

    Args:
        events: from `Follower.follow`.
        ended_job: returns the complete job as JSON after it has ended.
    """
    return _response(form, _body(events, form, job_id, ended_job, metrics))


def reconnect_response(form: Format, job_id: str) -> Response:
    """Respond with a stream that has no events and asks the client to reconnect.

    A browser's EventSource reconnects after this, but gives up after an error status.
    """
    return _response(form, form.opening + form.reconnect_hint(urls(job_id).stream))


def _response(form: Format, body: Iterator[bytes] | bytes) -> Response:
    return Response(body, content_type=f"{form.media_type}; charset=utf-8", headers=STREAM_HEADERS)


def _body(
    events: Generator[list[Event]],
    form: Format,
    job_id: str,
    ended_job: Callable[[], str],
    metrics: Metrics,
) -> Iterator[bytes]:
    with metrics.streams_open.track_inprogress(), StreamMeter(metrics) as meter, closing(events):
        yield form.opening
        try:
            for ready in events:
                meter.count(ready)
                done = ready[-1] if ready and ready[-1].kind is EventKind.DONE else None
                others = ready[:-1] if done else ready
                if others:
                    yield form.events(others)
                elif done is None:
                    yield form.heartbeat
                if done is not None:
                    yield form.events([done._replace(data=ended_job())])
                    return
        except (MlxqError, redis.RedisError) as error:
            interruption(error, job_id)
        yield form.reconnect_hint(urls(job_id).stream)


def interruption(error: MlxqError | redis.RedisError, job_id: str) -> MlxqError:
    """Log why a stream ends before its job; return what its client may know."""
    log.warning("stream_interrupted", extra={"job_id": job_id, "reason": str(error)})
    if isinstance(error, MlxqError):
        return error
    return Unavailable("The queue is unavailable. Try again shortly.", retry_after=1)


def restarting(job_id: str) -> Unavailable:
    """Return the error for clients that wait for a job while the process shuts down."""
    detail = f"The API process is restarting. The job continues: GET {urls(job_id).self}."
    return Unavailable(detail, code="restarting", retry_after=1)


class StreamMeter:
    """Measures the time to a stream's first chunk and counts its chunks, until its block ends."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._opened_at = time.monotonic()
        self._chunks = 0
        self._uncounted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.chunks.inc(self._uncounted)

    def count(self, events: Sequence[Event]) -> None:
        """Count the chunks among events that are sent now."""
        new = sum(event.kind is EventKind.CHUNK for event in events)
        if new and not self._chunks:
            self._metrics.first_chunk.observe(time.monotonic() - self._opened_at)
        self._chunks += new
        self._uncounted += new
        if self._uncounted >= _COUNTED_TOGETHER:
            self._metrics.chunks.inc(self._uncounted)
            self._uncounted = 0
