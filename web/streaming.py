"""A job's events as the body of an answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import redis
from flask import Response

from shared.errors import MlxqError
from shared.log import Event, EventKind
from web.metrics import Metrics
from web.sse import Format
from web.views import urls

log = logging.getLogger(__name__)

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def stream(
    events: Generator[Event | None], form: Format, job_id: str, ended_job: Callable[[], str], metrics: Metrics
) -> Response:
    """Send a job's events as they come.

    Args:
        ended_job: the whole job as JSON, once it has ended.
    """
    body = _body(events, form, urls(job_id).stream, ended_job, metrics)
    return Response(body, content_type=f"{form.media_type}; charset=utf-8", headers=_HEADERS)


def _body(
    events: Generator[Event | None], form: Format, where: str, ended_job: Callable[[], str], metrics: Metrics
) -> Iterator[bytes]:
    with metrics.streams_open.track_inprogress(), closing(_metered(events, metrics)) as passing:
        yield form.opening
        try:
            for event in passing:
                if event is None:
                    yield form.heartbeat
                elif event.kind is EventKind.DONE:
                    yield form.event(event.n, event.kind, ended_job())
                    return
                else:
                    yield form.event(event.n, event.kind, event.data)
        except (MlxqError, redis.RedisError) as error:
            log.warning("A stream ends before its job: %s", error)
        yield form.farewell(where)


def _metered(events: Generator[Event | None], metrics: Metrics) -> Generator[Event | None]:
    opened_at, first = time.monotonic(), True
    with closing(events):
        for event in events:
            if event is not None and event.kind is EventKind.CHUNK:
                metrics.chunks.inc()
                if first:
                    metrics.first_chunk.observe(time.monotonic() - opened_at)
                    first = False
            yield event
