"""Stream a job as the events of the Messages API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Final

import redis
from flask import Response

from shared.errors import MlxqError
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Status
from shared.wire import to_json
from web.anthropic.answer import Answer, delta_event, start_event
from web.http.anthropic_errors import error_body
from web.http.request_id import current_request_id
from web.metrics import Metrics
from web.results.failures import job_failure
from web.results.messages import delta_of
from web.streaming.response import STREAM_HEADERS, StreamMeter, interruption, restarting

MEDIA_TYPE: Final = "text/event-stream; charset=utf-8"
_SILENCE_S: Final = 10.0
"""Maximum time without an event while a job generates output that the stream leaves out."""


def deltas(events: Iterable[Event]) -> Iterator[Mapping[str, Any]]:
    """Yield what each chunk adds to the message."""
    return (delta_of(json.loads(event.data)) for event in events if event.kind is EventKind.CHUNK)


class MessageStream:
    """The stream of one job.

    Args:
        prompt_tokens: number of the prompt's tokens, if known.
        ended_job: returns the job's record after it has ended.

    Attributes:
        begun: whether a part of the answer was sent.
    """

    def __init__(
        self, job: Job, answer: Answer, max_tokens: int, prompt_tokens: int | None, ended_job: Callable[[], Job]
    ) -> None:
        self._job = job
        self._answer = answer
        self._max_tokens = max_tokens
        self._prompt_tokens = prompt_tokens
        self._ended_job = ended_job
        self._request_id = current_request_id()
        self._sent_at = time.monotonic()
        self.begun = False

    def response(self, events: Generator[list[Event]], metrics: Metrics) -> Response:
        """Return the response for the job's events, from the first on."""
        return Response(self._body(events, metrics), content_type=MEDIA_TYPE, headers=STREAM_HEADERS)

    def _body(self, events: Generator[list[Event]], metrics: Metrics) -> Iterator[bytes]:
        with metrics.streams_open.track_inprogress(), StreamMeter(metrics) as meter, closing(events):
            yield _encoded([start_event(self._job, self._prompt_tokens), {"type": "ping"}])
            try:
                for ready in events:
                    meter.count(ready)
                    translated = list(self._translated(ready))
                    self.begun = self.begun or bool(translated)
                    if translated := translated or self._ping(due=not ready):
                        self._sent_at = time.monotonic()
                        yield _encoded(translated)
                    if ready and ready[-1].kind is EventKind.DONE:
                        return
                error: MlxqError = restarting(self._job.id)
            except (MlxqError, redis.RedisError) as cause:
                error = interruption(cause, self._job.id)
            yield _encoded([self._error(error)])

    def _error(self, error: MlxqError) -> dict[str, Any]:
        return error_body(error, self._request_id).model_dump()

    def _ping(self, *, due: bool) -> list[dict[str, Any]]:
        """Return a ping if it is due: also while the model generates thoughts that the stream leaves out."""
        return [{"type": "ping"}] if due or time.monotonic() - self._sent_at >= _SILENCE_S else []

    def _translated(self, ready: list[Event]) -> Iterator[dict[str, Any]]:
        for delta in deltas(ready):
            yield from self._answer.add(delta)
        if ready and ready[-1].kind is EventKind.DONE:
            job = self._ended_job()
            if job.status is not Status.SUCCEEDED:
                yield self._error(job_failure(job, "messages"))
                return
            yield from self._answer.end()
            yield delta_event(job, self._max_tokens, has_calls=self._answer.has_calls)
            yield {"type": "message_stop"}


def _encoded(events: Iterable[dict[str, Any]]) -> bytes:
    return "".join([f"event: {event['type']}\ndata: {to_json(event)}\n\n" for event in events]).encode()
