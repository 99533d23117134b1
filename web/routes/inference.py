"""`POST /inference`: generate text and return it in the response. It creates a job like any other."""

from __future__ import annotations

from collections.abc import Callable

from flask import Blueprint, Response, request

from shared.jobs.record import Job, Status
from web.access.auth import caller
from web.http import openapi
from web.http.disconnect import CONNECTION
from web.http.openapi import describe
from web.http.request import read_body
from web.http.stream_formats import FORMATS, Format, negotiate
from web.results.failures import job_failure
from web.routes.submission import submit, with_job_headers
from web.routes.waiting import (
    disconnect_handler,
    ended_by_client,
    unfinished,
    wait_for_end,
    watch_client,
)
from web.schemas.jobs import InferenceView
from web.schemas.requests import InferenceRequest
from web.services import services
from web.streaming.response import stream_response

routes = Blueprint("inference", __name__)


@routes.post("/inference")
@describe(
    "Generate text",
    body=InferenceRequest,
    responses={200: InferenceView},
    streams=FORMATS,
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
    on_disconnect = disconnect_handler(job)
    response = _stream(job, form, on_disconnect) if form else _complete_text(job, prompt_field, on_disconnect)
    return with_job_headers(response, accepted)


def _complete_text(job: Job, prompt_field: str, on_disconnect: Callable[[], None]) -> Response:
    (ended,) = latest = wait_for_end([job], on_disconnect)
    if response := unfinished(latest):
        return response
    if ended.status is not Status.SUCCEEDED:
        raise job_failure(ended, prompt_field)
    return Response(services().job_views.inference_json(ended), content_type="application/json")


def _stream(job: Job, form: Format, on_disconnect: Callable[[], None]) -> Response:
    current = services()
    events = current.follower.follow(job.id, 0, watch_client(request.environ, on_disconnect))
    return stream_response(
        ended_by_client(events, on_disconnect),
        form,
        job.id,
        lambda: current.job_views.job_json(current.jobs.latest(job)),
        current.metrics,
    )
