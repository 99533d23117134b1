"""Responses that stream answers as Server-Sent Events, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Final

import redis
from flask import Response

from shared.errors import MlxqError
from shared.jobs.log import EventKind
from shared.jobs.record import Job, Status
from web.http.openai_errors import error_json
from web.http.stream_formats import EventStream
from web.metrics import Metrics
from web.openai.answers import DONE, Answer
from web.results.failures import job_failure
from web.streaming.merge import Feed
from web.streaming.response import STREAM_HEADERS, StreamMeter, interruption, restarting

_OPENING: Final = b": the request is accepted\n\n"
"""A comment. It makes the server send the headers, and tells proxies that the connection is alive."""


class AnswerStream:
    """The body of a response that streams an answer.

    Args:
        feed: the events of the jobs.
        latest: returns the present state of a job.
        prompt_field: name of the request field with the prompt.
        on_disconnect: called if the stream ends before all of its jobs.

    Attributes:
        begun: whether a part of the answer was sent.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        answer: Answer,
        feed: Feed,
        latest: Callable[[Job], Job],
        prompt_field: str,
        on_disconnect: Callable[[], None],
    ) -> None:
        self._jobs = list(jobs)
        self._running = set(range(len(jobs)))
        self._answer = answer
        self._feed = feed
        self._latest = latest
        self._prompt_field = prompt_field
        self._on_disconnect = on_disconnect
        self.begun = False

    def response(self, metrics: Metrics) -> Response:
        """Return the response."""
        body = self._body(metrics)
        return Response(body, content_type=f"{EventStream.media_type}; charset=utf-8", headers=STREAM_HEADERS)

    def _body(self, metrics: Metrics) -> Iterator[bytes]:
        with metrics.streams_open.track_inprogress(), StreamMeter(metrics) as meter, closing(self._feed):
            try:
                yield _OPENING
                yield from self._chunks(meter)
            except GeneratorExit:
                if self._running:  # sending failed; `watch_disconnect` may not have noticed yet
                    self._on_disconnect()
                raise
            except (MlxqError, redis.RedisError) as error:
                yield _error(interruption(error, self._jobs[0].id))

    def _chunks(self, meter: StreamMeter) -> Iterator[bytes]:
        for index, events in self._feed:
            meter.count(events)
            text = self._answer.chunks(index, events)
            if events and events[-1].kind is EventKind.DONE:
                text += self._end(index)
            self.begun = self.begun or bool(text)
            yield text.encode() or EventStream.heartbeat
            if not self._running:
                yield self._answer.usage(self._jobs).encode() + DONE
                return
        yield _error(restarting(self._jobs[0].id))

    def _end(self, index: int) -> str:
        job = self._jobs[index] = self._latest(self._jobs[index])
        self._running.discard(index)
        if job.status is not Status.SUCCEEDED:
            if self._running:  # the stream ends here, so nobody reads the other choices
                self._on_disconnect()
            raise job_failure(job, self._prompt_field)
        return self._answer.end(index, job)


def _error(error: MlxqError) -> bytes:
    return f"data: {error_json(error)}\n\n".encode() + DONE
