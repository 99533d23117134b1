"""`POST /inference`: generate text and return it in the response. It creates a job like any other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING

import redis
from flask import Blueprint, Response, request

from shared.errors import Conflict, Expired, Internal, Invalid, JobFailure, MlxqError, NotFound, Unavailable
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Status
from web.access.auth import caller
from web.http import openapi
from web.http.disconnect import CONNECTION, watch_disconnect
from web.http.openapi import describe
from web.http.problems import problem
from web.http.request import idempotency_key, read_body
from web.http.stream_formats import Format, negotiate
from web.routes.submission import submit
from web.schemas.jobs import InferenceView
from web.schemas.requests import InferenceRequest
from web.services import Services, services
from web.streaming.follower import Watch
from web.streaming.response import stream_response

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)
routes = Blueprint("inference", __name__)

CLIENT_CLOSED_REQUEST = 499
"""A status that nginx logs in this case."""
_CAUSED_BY_MODEL = {JobFailure.MODEL: NotFound, JobFailure.LOAD: Invalid}
_CAUSED_BY_REQUEST = frozenset({JobFailure.CONTEXT_LENGTH, JobFailure.TEMPLATE})


@routes.post("/inference")
@describe(
    "Generate text",
    body=InferenceRequest,
    responses={200: InferenceView},
    streams=True,
    errors=(400, 404, 406, 409, 410, 413, 415, 422, 504),
    parameters=(openapi.IDEMPOTENCY_KEY,),
)
def infer() -> Response:
    """Returns the generated text when it is complete, or a stream of events if `stream` is true.

    The `Accept` header selects the format of the stream: `text/event-stream` (default) or `application/x-ndjson`. The
    `Location` header has the path of the job.

    If the client disconnects, the job is cancelled. With an `Idempotency-Key` it is not: the same request sent again
    returns the same job.

    If the API process is restarted, jobs continue. A stream ends with a hint where to resume it, and a request that
    waits for complete text gets status 503 with code `restarting`.
    """
    return services().open_responses.respond(caller().id, request.environ.get(CONNECTION), _respond)


def _respond() -> Response:
    body = read_body(InferenceRequest)
    form = negotiate(request.accept_mimetypes) if body.stream else None
    accepted, prompt_field = submit(body), body.prompt_field
    del body  # the response can take hours, and a body many megabytes
    job = accepted.job
    # With an Idempotency-Key, other requests may be waiting for the same job, now or later.
    on_disconnect = keep_job if idempotency_key() else job_canceller(services(), job)
    response = _stream(job, form, on_disconnect) if form else _complete_text(job, prompt_field, on_disconnect)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not accepted.new:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _complete_text(job: Job, prompt_field: str, on_disconnect: Callable[[], None]) -> Response:
    current = services()
    watch = watch_client(request.environ, on_disconnect)
    current.follower.wait(job.id, None, linger_s=current.settings.drain_s / 2, watch=watch)
    ended = current.jobs.latest(job)
    if not ended.status.terminal and not current.hub.closing:
        return Response(status=CLIENT_CLOSED_REQUEST)  # nobody reads it, but it is logged and counted
    if not ended.status.terminal:
        detail = "The API process is restarting. The job continues; its path is in the Location header."
        return problem(Unavailable(detail, code="restarting", retry_after=1))
    if ended.status is not Status.SUCCEEDED:
        raise job_failure(ended, prompt_field)
    return Response(current.job_views.inference_json(ended), content_type="application/json")


def _stream(job: Job, form: Format, on_disconnect: Callable[[], None]) -> Response:
    current = services()
    return stream_response(
        ended_by_client(
            current.follower.follow(job.id, 0, watch_client(request.environ, on_disconnect)), on_disconnect
        ),
        form,
        job.id,
        lambda: current.job_views.job_json(current.jobs.latest(job)),
        current.metrics,
    )


def watch_client(environ: WSGIEnvironment, on_disconnect: Callable[[], None]) -> Watch:
    """Return a watch that also calls `on_disconnect`."""

    def watch(wake: Callable[[], None]) -> AbstractContextManager[None]:
        def disconnected() -> None:
            on_disconnect()
            wake()

        return watch_disconnect(environ, disconnected)

    return watch


def ended_by_client(events: Generator[list[Event]], on_disconnect: Callable[[], None]) -> Generator[list[Event]]:
    """Pass events on; call `on_disconnect` if sending fails before the last one."""
    with closing(events):
        for ready in events:
            ended = bool(ready) and ready[-1].kind is EventKind.DONE
            try:
                yield ready
            except GeneratorExit:
                if not ended:  # sending failed; `watch_disconnect` may not have noticed yet
                    on_disconnect()
                raise


def keep_job() -> None:
    """Let the job continue without its client."""


def job_canceller(current: Services, job: Job) -> Callable[[], None]:
    """Return a function that cancels the job the first time it is called."""
    called = False

    def cancel() -> None:
        nonlocal called
        if called or current.hub.closing:  # while the process shuts down, connections are not closed by clients
            return
        called = True
        try:
            current.jobs.stop(job.id, job.owner)
            log.info("job_cancelled_on_disconnect", extra={"job_id": job.id})
        except (MlxqError, redis.RedisError) as error:
            log.info("job_cancel_failed", extra={"job_id": job.id, "reason": str(error)})

    return cancel


def job_failure(job: Job, prompt_field: str) -> MlxqError:
    """Return the error for a job that ended without success.

    Args:
        prompt_field: name of the request field with the prompt.
    """
    code, message = job.error_code, job.error_message or "The job failed."
    if job.status is Status.CANCELLED:
        return Conflict("The job was cancelled.", code="job_cancelled")
    if job.status is Status.EXPIRED:
        return Expired(job.error_message or "The job did not end within its deadline.", code=code)
    if code in _CAUSED_BY_REQUEST:
        return Invalid(message, code=code, field=prompt_field)
    for failure, error in _CAUSED_BY_MODEL.items():
        if code == failure:
            return error(message, code=code, field="model")
    return Internal(message, code=code)
