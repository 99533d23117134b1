"""A job's events as the body of an answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import redis
from flask import Response

from shared.errors import MlxqError
from shared.jobs.log import Event, EventKind
from web.metrics import Metrics
from web.results.job_views import urls
from web.streaming.formats import Format

log = logging.getLogger(__name__)

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

_COUNT_EACH = 32
"""Chunks of a stream that are counted together: a counter that all processes share costs as much as a chunk."""


def stream(
    events: Generator[list[Event]], form: Format, job_id: str, ended_job: Callable[[], str], metrics: Metrics
) -> Response:
    """Send a job's events as they come.

    Args:
        ended_job: the whole job as JSON, once it has ended.
    """
    body = _body(events, form, urls(job_id).stream, ended_job, metrics)
    return Response(body, content_type=f"{form.media_type}; charset=utf-8", headers=_HEADERS)


def come_again(form: Format, where: str) -> Response:
    """A stream without events, for a reader who is to ask again: a browser's EventSource takes any error as final."""
    return Response(
        form.opening + form.farewell(where), content_type=f"{form.media_type}; charset=utf-8", headers=_HEADERS
    )


def _body(
    events: Generator[list[Event]], form: Format, where: str, ended_job: Callable[[], str], metrics: Metrics
) -> Iterator[bytes]:
    with metrics.streams_open.track_inprogress(), closing(_metered(events, metrics)) as passing:
        yield form.opening
        try:
            for ready in passing:
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
            log.warning("stream_ended_early", extra={"reason": str(error)})
        yield form.farewell(where)


def _metered(events: Generator[list[Event]], metrics: Metrics) -> Generator[list[Event]]:
    opened_at, chunks, uncounted = time.monotonic(), 0, 0
    try:
        with closing(events):
            for ready in events:
                new = len([event for event in ready if event.kind is EventKind.CHUNK])
                if new and not chunks:
                    metrics.first_chunk.observe(time.monotonic() - opened_at)
                chunks += new
                uncounted += new
                if uncounted >= _COUNT_EACH:
                    metrics.chunks.inc(uncounted)
                    uncounted = 0
                yield ready
    finally:
        metrics.chunks.inc(uncounted)
