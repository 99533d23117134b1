"""Submit the lines of batches as jobs, and turn their ends into results."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import redis
from pydantic import ValidationError

from shared.errors import Internal, MlxqError, NotFound, RateLimited, Unavailable
from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Job, Status
from shared.jobs.store import Accepted, Jobs
from shared.redis.client import passes
from shared.settings import Settings
from shared.tracing import TraceParent, Tracer
from web.admission.admit import Admission, RequestContext
from web.admission.image_loader import ImageLoader
from web.batches.lines import Line
from web.batches.results import ERROR, OUTPUT, Result
from web.batches.store import Batch, BatchStatus
from web.http.openai_errors import CODES, error_json, status_of
from web.http.problems import invalid_fields
from web.results.failures import job_failure
from web.schemas.inputs import InputsRequest
from web.schemas.requests import JobRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

_FINGERPRINT: Final = "batch"
"""The same for all lines: their keys cannot be those of other requests."""
_MIN_TIME_S: Final = 1.0
_MIN_RETENTION_S: Final = 3600
"""How long the result of a line may take to reach the disk: on a busy machine longer than a short RETENTION_S."""


@dataclass(frozen=True, slots=True)
class Translated:
    """The body of a line as requests of this service.

    Attributes:
        requests: what to generate.
        choices: number of jobs for each request. All jobs are children of the first one.
        prompt_field: name of the field with the prompt.
        render: returns the response body as JSON, once all jobs have succeeded.
        original_fields: lets errors inside its block name the fields of the line's body.
    """

    requests: Sequence[JobRequest] | Sequence[InputsRequest]
    choices: int
    prompt_field: str
    render: Callable[[Sequence[Job]], str]
    original_fields: Callable[[], AbstractContextManager[None]]


Endpoints: TypeAlias = Mapping[str, Callable[[dict[str, Any]], Translated]]
"""Translates bodies, by endpoint. Raises `MlxqError` or `pydantic.ValidationError` for an invalid body."""


@dataclass(frozen=True, slots=True)
class Running:
    """A line whose jobs have not all ended.

    Attributes:
        job_ids: the jobs of all choices; the others are children of the first one.
    """

    line: Line
    job_ids: Sequence[str]
    translated: Translated


def idempotency_key(batch: Batch, line: int) -> str:
    """Return the Idempotency-Key of a line's job, because of which each line runs once.

    The space distinguishes it from the keys of clients, which cannot contain one.
    """
    return f"{batch.id} {line}"


class LineRequests:
    """Submits lines and renders results.

    Args:
        limits_of: returns the present limits of an API key; None if this host does not know the key.
        tracer: None to send no traces.
    """

    def __init__(
        self,
        settings: Settings,
        admission: Admission,
        image_loader: ImageLoader,
        jobs: Jobs,
        endpoints: Endpoints,
        limits_of: Callable[[str], OwnerLimits | None] = lambda _: None,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings
        self._admission = admission
        self._image_loader = image_loader
        self._jobs = jobs
        self._endpoints = endpoints
        self._limits_of = limits_of
        self._tracer = tracer

    def submit(self, batch: Batch, line: Line) -> Running | Result:
        """Submit a line's job, or find the job that an earlier leader submitted; an error result if it is invalid.

        Raises:
            RateLimited, Unavailable: the queue accepts no job at this moment, or only later versions know the endpoint.
            redis.RedisError: Redis is unavailable at this moment.
        """
        if batch.endpoint not in self._endpoints:  # a process of a later version accepted the batch, and may soon lead
            raise Unavailable(f"This version does not know the endpoint {batch.endpoint}.")
        try:
            translated = self._endpoints[batch.endpoint](line.body)
            with translated.original_fields():
                job_ids = self._admit(batch, line, translated)
        except ValidationError as error:
            return error_result(batch, line, invalid_fields(error, CODES)[0])
        except (RateLimited, Unavailable):
            raise
        except MlxqError as error:
            return error_result(batch, line, error)
        except redis.RedisError as error:
            if passes(error):
                raise
            return _internal(batch, line, error)
        except Exception as error:  # noqa: BLE001 -- a line must not stop its batch
            return _internal(batch, line, error)
        return Running(line, job_ids, translated)

    def result(self, batch: Batch, running: Running) -> Result:
        """Return the result of a line whose job has ended.

        Raises:
            redis.RedisError: Redis is unavailable at this moment.
        """
        line = running.line
        try:
            jobs = [self._jobs.get(job_id, batch.owner) for job_id in running.job_ids]
            for job in jobs:
                if job.status is not Status.SUCCEEDED:
                    return self._failure(batch, running, job)
            response = {
                "status_code": 200,
                "request_id": jobs[0].id,
                "body": json.loads(running.translated.render(jobs)),
            }
        except redis.RedisError:
            raise
        except NotFound:
            return error_result(batch, line, NotFound("The job was deleted.", code="job_not_found"))
        except Exception as error:  # noqa: BLE001 -- a line must not stop its batch
            return _internal(batch, line, error)
        return Result(line.number, OUTPUT, _entry(batch, line, response=response), _tokens(jobs, running))

    def _failure(self, batch: Batch, running: Running, job: Job) -> Result:
        if job.status in (Status.EXPIRED, Status.CANCELLED) and time.time() > batch.window_ends_at:
            return expired_result(batch, running.line)
        if job.status is Status.CANCELLED and batch.status is BatchStatus.CANCELLING:
            return _unfinished(batch, running.line, "batch_cancelled", "The batch was cancelled.")
        return error_result(batch, running.line, job_failure(job, running.translated.prompt_field))

    def _admit(self, batch: Batch, line: Line, translated: Translated) -> Sequence[str]:
        """Return the ids of the line's jobs."""
        key, left_s = idempotency_key(batch, line.number), max(batch.window_ends_at - time.time(), _MIN_TIME_S)
        known = self._jobs.find(batch.owner, [key])[0]
        if known is not None:
            return [known, *self._jobs.get(known, batch.owner).children]
        limits = {
            "priority": "batch",
            "start_within_s": min(left_s, self._settings.max_start_within_s),
            "deadline_s": min(left_s, self._settings.max_deadline_s),
        }
        requests = [request.model_copy(update=limits) for request in translated.requests]
        loaded = [self._image_loader.load(request, caller=batch.owner) for request in requests]
        files = {digest: file for each in loaded for digest, file in each.files.items()}
        span = self._start_span(batch, line)
        trace = TraceParent.of(span) if span else None
        context = RequestContext(
            owner=batch.owner,
            request_id=batch.request_id,
            idempotency_key=key,
            fingerprint=_FINGERPRINT,
            limits=self._limits_of(batch.owner) or OwnerLimits(max_queued=batch.max_queued),
            silent=True,
            min_retention_s=_MIN_RETENTION_S,
            traceparent=str(trace) if trace else "",
        )
        admitted = [each.request for each in loaded]
        accepted = self._admission.admit_all(admitted, context, files, choices=translated.choices)
        if span and accepted.new:  # a span that does not end is not sent, such as that of a line that must wait
            _end_span(span, accepted)
        return [accepted.job.id, *accepted.job.children]

    def _start_span(self, batch: Batch, line: Line) -> Span | None:
        """Start a trace for a line's job, linked to the request that created the batch. None without a collector."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import Link, SpanKind

        creation = TraceParent.parse(batch.traceparent)
        attributes = {
            "mlxq.batch.id": batch.id,
            "mlxq.batch.line": line.number,
            "mlxq.request_id": batch.request_id,
            "mlxq.key_id": batch.owner,
        }
        links = [Link(creation.context())] if creation else []
        name = f"batch line {batch.endpoint}"
        return self._tracer.start(name, None, kind=SpanKind.CONSUMER, attributes=attributes, links=links)


def _end_span(span: Span, accepted: Accepted) -> None:
    span.set_attribute("gen_ai.response.id", accepted.job.id)
    if accepted.place:
        span.set_attribute("mlxq.queue_position", accepted.place.position)
    span.end()


def error_result(batch: Batch, line: Line, error: MlxqError) -> Result:
    """Return the result of a line that was refused or failed."""
    body = json.loads(error_json(error))
    response = {"status_code": status_of(error.status), "request_id": batch.request_id, "body": body}
    return Result(line.number, ERROR, _entry(batch, line, response=response))


def expired_result(batch: Batch, line: Line) -> Result:
    """Return the result of a line that did not end within the completion window."""
    message = "This request could not be executed before the completion window expired."
    return _unfinished(batch, line, "batch_expired", message)


def _internal(batch: Batch, line: Line, error: Exception) -> Result:
    log.error("batch_line_failed", exc_info=error, extra={"batch_id": batch.id, "line": line.number})
    return error_result(batch, line, Internal("An internal error occurred. Its cause is in the log."))


def _unfinished(batch: Batch, line: Line, code: str, message: str) -> Result:
    return Result(line.number, ERROR, _entry(batch, line, error={"code": code, "message": message}))


def _tokens(jobs: Sequence[Job], running: Running) -> tuple[int, int, int, int]:
    """Return prompt, cached, completion and reasoning tokens. A prompt counts once, however many choices it has."""
    prompts = jobs[:: running.translated.choices]
    return (
        sum(job.prompt_tokens or 0 for job in prompts),
        sum(job.cached_tokens or 0 for job in prompts),
        sum(job.completion_tokens or 0 for job in jobs),
        sum(job.reasoning_tokens or 0 for job in jobs),
    )


def _entry(
    batch: Batch, line: Line, *, response: dict[str, Any] | None = None, error: dict[str, str] | None = None
) -> dict[str, Any]:
    identity = hashlib.blake2b(json.dumps([batch.id, line.number]).encode(), digest_size=12).hexdigest()
    return {"id": f"batch_req_{identity}", "custom_id": line.custom_id, "response": response, "error": error}
