"""`POST /inference`: prompt in, text out, on one connection. Behind it is a job like any other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING

import redis
from flask import Blueprint, Response, request

from shared.errors import Conflict, Expired, Internal, Invalid, JobFailure, MlxqError, Unavailable
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Status
from web.admission.submit import submit
from web.http import openapi
from web.http.disconnect import watching
from web.http.openapi import describe
from web.http.problems import problem
from web.http.request import idempotency_key, read_body
from web.schemas.jobs import InferenceView
from web.schemas.requests import InferenceRequest
from web.services import Services, services
from web.streaming.formats import Format, negotiate
from web.streaming.response import stream

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)
routes = Blueprint("inference", __name__)

_CALLERS_FAULT = frozenset({JobFailure.CONTEXT_LENGTH, JobFailure.TEMPLATE})


@routes.post("/inference")
@describe(
    "Generate text",
    body=InferenceRequest,
    answers={200: InferenceView},
    streams=True,
    errors=(400, 406, 409, 410, 413, 415, 422, 504),
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def infer() -> Response:
    """The answer, or with `"stream": true` a stream of events.

    A client that goes away cancels its job, but not when it sent an Idempotency-Key: sent again, the request gets the
    same job, which ends by its deadline.

    When this API process is stopped, nobody's job is cancelled: a stream ends with a hint where it goes on, and who
    waits for a whole answer gets 503 `restarting`. `Location` names the job.
    """
    wanted = read_body(InferenceRequest)
    form = negotiate(request.accept_mimetypes) if wanted.stream else None
    accepted = submit(wanted)
    job = accepted.job
    # Under an Idempotency-Key others may wait for the same job, now or later.
    gone = _leave if idempotency_key() else _canceller(services(), job)
    reply = _stream(job, form, gone) if form else _whole(job, wanted.prompt_field, gone)
    reply.headers["Location"] = f"/v1/jobs/{job.id}"
    if not accepted.new:
        reply.headers["Idempotency-Replayed"] = "true"
    return reply


def _whole(job: Job, prompt_field: str, gone: Callable[[], None]) -> Response:
    parts = services()
    with watching(request.environ, gone):
        parts.follower.wait(job.id, None, linger_s=parts.settings.drain_s / 2)
    ended = parts.jobs.get(job.id, job.owner)
    if not ended.status.terminal:
        return problem(Unavailable("This process ends; the job goes on at Location.", code="restarting", retry_after=1))
    if ended.status is not Status.SUCCEEDED:
        raise failure(ended, prompt_field)
    return Response(parts.views.answer(ended), content_type="application/json")


def _stream(job: Job, form: Format, gone: Callable[[], None]) -> Response:
    parts = services()
    return stream(
        _watched(parts.follower.follow(job.id, 0), request.environ, gone),
        form,
        job.id,
        lambda: parts.views.full(parts.jobs.get(job.id, job.owner)),
        parts.metrics,
    )


def _watched(
    events: Generator[list[Event]], environ: WSGIEnvironment, gone: Callable[[], None]
) -> Generator[list[Event]]:
    with closing(events), watching(environ, gone):
        for ready in events:
            ended = bool(ready) and ready[-1].kind is EventKind.DONE
            try:
                yield ready
            except GeneratorExit:
                if not ended:  # it could not be sent, which the watch may miss
                    gone()
                raise


def _leave() -> None:
    """Let the job go on without its client."""


def _canceller(parts: Services, job: Job) -> Callable[[], None]:
    told = False

    def cancel() -> None:
        nonlocal told
        if told or parts.hub.closing:  # then it is not the client who ends the connection
            return
        told = True
        try:
            parts.jobs.stop(job.id, job.owner)
            log.info("job_cancelled_without_client", extra={"job_id": job.id})
        except (MlxqError, redis.RedisError) as error:
            log.info("job_not_cancelled", extra={"job_id": job.id, "reason": str(error)})

    return cancel


def failure(job: Job, prompt_field: str) -> MlxqError:
    """The error that tells why a job gave no answer; its prompt came in `prompt_field`."""
    code, message = job.error_code, job.error_message or "The job failed."
    if job.status is Status.CANCELLED:
        return Conflict("The job was cancelled.", code="job_cancelled")
    if job.status is Status.EXPIRED:
        return Expired(job.error_message or "The job did not end within its time.", code=code)
    if code in _CALLERS_FAULT:
        return Invalid(message, code=code, field=prompt_field)
    return Internal(message, code=code)
