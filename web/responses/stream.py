"""Stream a response as the events of the Responses API."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, Final

import redis
from flask import Response

from shared.errors import MlxqError
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job
from shared.wire import to_json
from web.http.openai_errors import error_json
from web.http.stream_formats import EventStream
from web.metrics import Metrics
from web.responses.events import ResponseEvents
from web.responses.output import StreamEvent
from web.streaming.response import STREAM_HEADERS, StreamMeter, interruption, restarting

_OPENING: Final = b": the request is accepted\n\n"
"""A comment. It makes the server send the headers, and tells proxies that the connection is alive."""


class ResponseStream:
    """The stream of one response.

    Args:
        translated: translates the job's events; it may have read some of them.
        latest: returns the present state of the job.
        after: sequence number of the last event that the client has; -1 for none.

    Attributes:
        begun: whether a part of the answer was sent.
    """

    def __init__(self, job: Job, translated: ResponseEvents, latest: Callable[[Job], Job], after: int = -1) -> None:
        self._job = job
        self._translated = translated
        self._latest = latest
        self._sent = after
        self.begun = False

    def response(self, events: Generator[list[Event]], metrics: Metrics) -> Response:
        """Return the HTTP response for the job's events."""
        content_type = f"{EventStream.media_type}; charset=utf-8"
        return Response(self._body(events, metrics), content_type=content_type, headers=STREAM_HEADERS)

    def _body(self, events: Generator[list[Event]], metrics: Metrics) -> Iterator[bytes]:
        with metrics.streams_open.track_inprogress(), StreamMeter(metrics) as meter, closing(events):
            yield _OPENING
            try:
                for ready in events:
                    meter.count(ready)
                    yield _encoded(self._new(ready)) or EventStream.heartbeat
                    if self._translated.final is not None:
                        return
                error: MlxqError = restarting(self._job.id)
            except (MlxqError, redis.RedisError) as cause:
                error = interruption(cause, self._job.id)
            yield _encoded([self._error(error)])

    def _new(self, ready: list[Event]) -> list[StreamEvent]:
        """Return the events that the client does not have yet."""
        done = bool(ready) and ready[-1].kind is EventKind.DONE
        events = self._translated.of(ready, self._latest(self._job) if done else self._job)
        new = [event for event in events if event["sequence_number"] > self._sent]
        if new:
            self._sent = new[-1]["sequence_number"]
        self.begun = self.begun or any(event["type"].endswith(".delta") for event in new)
        return new

    def _error(self, error: MlxqError) -> StreamEvent:
        """Return the event of an interruption. It is not part of the numbering, so its number is the last one sent."""
        details: dict[str, Any] = json.loads(error_json(error))["error"]
        fields = {name: details[name] for name in ("code", "message", "param")}
        return {"type": "error", **fields, "sequence_number": max(self._sent, 0)}


def _encoded(events: Iterable[StreamEvent]) -> bytes:
    return "".join([f"event: {event['type']}\ndata: {to_json(event)}\n\n" for event in events]).encode()
