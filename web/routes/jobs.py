"""`/v1/jobs`: submit, look, list, cancel, forget, stream."""

from __future__ import annotations

import logging
from urllib.parse import quote

import redis
from flask import Blueprint, Response, request

from shared.errors import Invalid
from shared.jobs.record import Job
from shared.queue.redis import passes
from web.access.auth import caller
from web.admission.submit import submit
from web.http import openapi
from web.http.openapi import describe
from web.http.request import preferred_wait_s, read_body, wait_s, whole_number
from web.results.job_views import urls
from web.schemas.jobs import JobList, JobView
from web.schemas.requests import JobRequest
from web.services import services
from web.streaming.formats import EventStream, Format, negotiate
from web.streaming.response import come_again, stream

log = logging.getLogger(__name__)

routes = Blueprint("jobs", __name__, url_prefix="/v1/jobs")

_PAGE = 20
_LARGEST_PAGE = 100
_LAST_EVENT_ID = "Last-Event-ID"


@routes.post("")
@describe(
    "Submit a job",
    body=JobRequest,
    answers={202: JobView, 200: JobView},
    errors=(400, 409, 413, 415, 422),
    parameters=(openapi.IDEMPOTENCY_KEY, openapi.PREFER),
)
def submit_job() -> Response:
    """Accepted means durable: the job survives everything but its deadline.

    202 while it is under way, 200 when it ended within `Prefer: wait`.

    Repeated with the same Idempotency-Key, it gives the first job again, however that went, with the header
    `Idempotency-Replayed: true`. Another request under the key is refused with 422, `idempotency_key_reused`. Requests
    are the same when they ask for the same: spaces, the order of names and the API's own defaults that are spelt out do
    not count; what the settings decide (model, max_tokens, temperature, times) does when it is spelt out. Images are
    the same when their bytes are, however they are sent; at http(s) URLs when the URLs are, and those are read once.
    The key is the API key's own; it is kept until the job is deleted or its retention is over.
    """
    accepted = submit(read_body(JobRequest))
    job, patience_s = accepted.job, preferred_wait_s(services().settings.max_wait_s)
    if patience_s:
        answer = _answer_job(_wait(job, patience_s))
    else:
        answer = _json(services().views.accepted(accepted), 200 if job.status.terminal else 202)
    answer.headers["Location"] = f"/v1/jobs/{job.id}"
    if patience_s:
        answer.headers["Preference-Applied"] = f"wait={patience_s:g}"
    if not accepted.new:
        answer.headers["Idempotency-Replayed"] = "true"
    return answer


@routes.get("/<job_id>")
@describe("Get a job", answers={200: JobView}, errors=(404, 422), parameters=(openapi.WAIT,))
def get_job(job_id: str) -> Response:
    """With `wait`, answer when the job has ended or the time is over."""
    job = services().jobs.get(job_id, caller().id)
    return _json(services().views.full(_wait(job, wait_s(services().settings.max_wait_s))))


@routes.get("")
@describe("List jobs", answers={200: JobList}, errors=(422,), parameters=(openapi.LIMIT, openapi.BEFORE))
def list_jobs() -> Response:
    """The caller's own, newest first."""
    limit = whole_number("limit", request.args.get("limit", str(_PAGE)), 1, _LARGEST_PAGE)
    jobs = services().jobs.recent(caller().id, limit=limit, before=_before())
    following = repr(jobs[-1].created_at) if len(jobs) == limit else None
    return _json(JobList(data=services().views.brief(jobs), next=following).model_dump_json())


@routes.post("/<job_id>/cancel")
@describe("Cancel a job", answers={200: JobView, 202: JobView}, errors=(404, 409, 422), parameters=(openapi.WAIT,))
def cancel_job(job_id: str) -> Response:
    """200 once it is over; 202 while its worker is being told. `wait` waits for that."""
    patience_s = wait_s(services().settings.max_wait_s)
    return _answer_job(_wait(services().jobs.stop(job_id, caller().id), patience_s))


@routes.delete("/<job_id>")
@describe("Delete a job", answers={204: None}, errors=(404, 409))
def delete_job(job_id: str) -> Response:
    """Forget a job that has ended, with its log."""
    services().jobs.forget(job_id, caller().id)
    return Response(status=204)


@routes.get("/<job_id>/stream")
@describe(
    "Stream a job",
    answers={204: None},
    streams=True,
    errors=(404, 406, 410, 422),
    parameters=(openapi.LAST_EVENT_ID, openapi.STARTING_AFTER),
)
def stream_job(job_id: str) -> Response:
    """The job's events from any cursor on, live until its end, as often and by as many readers as wanted.

    204 when nothing follows any more, which tells a browser's EventSource not to reconnect. 410 when the events after
    the cursor are not kept any more (`log_expired`), or not all (`log_trimmed`): an ended job still has its text.

    While the queue cannot be reached, an EventSource that reconnects gets an empty stream instead of 503: it would take
    that as final.
    """
    form = negotiate(request.accept_mimetypes)
    cursor = _cursor()
    try:
        return _stream(job_id, form, cursor)
    except redis.RedisError as error:
        if passes(error) and _reconnects(form):
            log.warning("stream_postponed", extra={"job_id": job_id, "reason": str(error)})
            return come_again(form, urls(quote(job_id)).stream)  # whose job it is, nobody knows now
        raise


def _stream(job_id: str, form: Format, cursor: int) -> Response:
    jobs, views, owner = services().jobs, services().views, caller().id
    job = jobs.get(job_id, owner)
    if job.status.terminal and cursor >= job.last_event:
        return Response(status=204)
    return stream(
        services().follower.follow(job_id, cursor),
        form,
        job_id,
        lambda: views.full(jobs.get(job_id, owner)),
        services().metrics,
    )


def _reconnects(form: Format) -> bool:
    """Whether this may be a browser's EventSource that had events before."""
    return isinstance(form, EventStream) and bool(request.headers.get(_LAST_EVENT_ID))


def _cursor() -> int:
    """Last-Event-ID wins: a browser that reconnects sends it to the address it first opened."""
    last = request.headers.get(_LAST_EVENT_ID)
    if last:
        return whole_number(_LAST_EVENT_ID, last)
    return whole_number("starting_after", request.args.get("starting_after", "0"))


def _before() -> float | None:
    text = request.args.get("before")
    if text is None:
        return None
    try:
        moment = float(text)
    except ValueError:
        moment = -1.0
    if not 0 <= moment < 1e11:
        raise Invalid("Give the `next` of the page before.", field="before")
    return moment


def _wait(job: Job, patience_s: float) -> Job:
    """The job, as it is when it has ended or patience is over."""
    if job.status.terminal or not patience_s:
        return job
    services().follower.wait(job.id, patience_s)
    return services().jobs.get(job.id, job.owner)


def _answer_job(job: Job) -> Response:
    return _json(services().views.full(job), 200 if job.status.terminal else 202)


def _json(view: str, status: int = 200) -> Response:
    return Response(view, status, content_type="application/json")
