"""`/v1/jobs`: submit jobs; read, stream, list, cancel and delete them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar
from urllib.parse import quote

import redis
from flask import Blueprint, Response, request
from werkzeug.datastructures import MultiDict

from shared.errors import Conflict, Gone, Invalid, NotFound, RateLimited
from shared.jobs.record import Job, Priority, Status
from shared.jobs.search import JobFilter, JobPage
from shared.redis.client import passes
from web.access.auth import caller, require_scope, visible_owner
from web.archive.history import HistoryPage
from web.http import openapi
from web.http.disconnect import CONNECTION, watch_disconnect
from web.http.openapi import describe
from web.http.request import parse_integer, preferred_wait_s, read_body, wait_s
from web.http.stream_formats import FORMATS, EventStream, Format, negotiate
from web.responses.view import response_id
from web.routes.submission import submit, with_job_headers
from web.schemas.jobs import JobList, JobView
from web.schemas.requests import MAX_METADATA, JobRequest
from web.services import services
from web.streaming.response import reconnect_response, stream_response

log = logging.getLogger(__name__)

routes = Blueprint("jobs", __name__, url_prefix="/v1/jobs")

_DEFAULT_LIMIT = 20
_MAX_LIMIT = 100
_LAST_EVENT_ID = "Last-Event-ID"
ALL_KEYS: Final = "all"

T = TypeVar("T")


@routes.post("")
@describe(
    "Submit a job",
    body=JobRequest,
    responses={202: JobView, 200: JobView},
    errors=(400, 404, 409, 413, 415, 422),
    parameters=(openapi.IDEMPOTENCY_KEY, openapi.PREFER),
)
def submit_job() -> Response:
    """An accepted job is durable: it survives restarts and crashes of every process of the service.

    The status is 202 while the job is queued or running, and 200 if it has ended, for example within `Prefer: wait=N`.
    The `Location` header has the path of the job.

    **Idempotency.** If the same request is sent again with the same `Idempotency-Key`, the response is the existing
    job, whatever its status, with the header `Idempotency-Replayed: true`. A different request with the same key gets
    422 with code `idempotency_key_reused`. Keys are separate for each API key. They are valid until the job is deleted
    or its retention ends.

    Two requests are the same if their route and the values of all fields are the same. The formatting of the JSON, the
    order of names, and default values that are fixed by this API make no difference. Values whose default depends on
    the model or the service (`model`, `max_tokens`, `temperature`, time limits) do, even if they equal that
    default. Images are compared by their content, and images at http(s) URLs, which are read only once, by their URL.
    """
    accepted = submit(read_body(JobRequest))
    job, max_wait_s = accepted.job, preferred_wait_s(services().settings.max_wait_s)
    if max_wait_s:
        response = _job_response(_wait(job, max_wait_s))
        response.headers["Preference-Applied"] = f"wait={max_wait_s:g}"
    else:
        response = _json(services().job_views.accepted_json(accepted), 200 if job.status.terminal else 202)
    return with_job_headers(response, accepted)


@routes.get("/<job_id>")
@describe("Get a job", responses={200: JobView}, errors=(404, 422), parameters=(openapi.WAIT,))
def get_job(job_id: str) -> Response:
    """The job with its text so far. With `wait`, the response comes when the job has ended or the time is over.

    After `RETENTION_S`, jobs come from the archive.
    """
    max_wait_s = wait_s(services().settings.max_wait_s)
    job, archived = services().history.get(job_id, visible_owner())
    if archived is not None:
        return _json(services().job_views.archived_json(job, archived.text))
    return _json(services().job_views.job_json(_wait_or_refuse(job, max_wait_s)))


@routes.get("")
@describe(
    "List jobs",
    responses={200: JobList},
    errors=(422,),
    parameters=(openapi.LIMIT, openapi.BEFORE, *openapi.JOB_FILTERS),
)
def list_jobs() -> Response:
    """The jobs of the API key, newest first. To get the next page, pass `next` as `before`.

    Jobs that have ended stay in the list after `RETENTION_S` as long as the archive has them.

    Filters are combined: a job must match all of them. With the scope `admin`, `key` selects the jobs of another API
    key, or of all keys.
    """
    limit = parse_integer("limit", request.args.get("limit", str(_DEFAULT_LIMIT)), 1, _MAX_LIMIT)
    page = find_jobs(request.args, limit)
    next_page = None if page.next is None else repr(page.next)
    items = services().job_views.list_items(page.jobs, page.texts)
    return _json(JobList(data=items, next=next_page, complete=page.complete).model_dump_json())


@routes.post("/<job_id>/cancel")
@describe("Cancel a job", responses={200: JobView, 202: JobView}, errors=(404, 409, 422), parameters=(openapi.WAIT,))
def cancel_job(job_id: str) -> Response:
    """The status is 200 if the job has been cancelled, and 202 if it is running and will be cancelled shortly.

    With `wait`, the response comes when the job has ended or the time is over. Cancelling a job that has ended in
    another way is refused with 409.
    """
    max_wait_s, owner = wait_s(services().settings.max_wait_s), visible_owner()
    try:
        job = services().jobs.stop(job_id, owner)
    except NotFound:
        if archived := services().history.archived(job_id, owner):
            raise Conflict(f"The job has already ended: {archived.job.status}.", code="job_ended") from None
        raise
    return _job_response(_wait(job, max_wait_s))


@routes.delete("/<job_id>")
@describe("Delete a job", responses={204: None}, errors=(404, 409))
def delete_job(job_id: str) -> Response:
    """Deletes a job that has ended, with its text and events. A job that has not ended must be cancelled first.

    The job, and a stored response that it generated, cannot be read any more when this returns. Within seconds, the
    background process erases the job from the archive. Within minutes, workers erase the cached prefixes that no other
    job of the API key has used since.
    """
    current = services()
    job, archived = current.history.get(job_id, visible_owner())
    if archived is None:
        with suppress(NotFound):  # it has expired since
            current.jobs.forget(job_id, job.owner, erase=True)
    current.history.erase([job.id, *job.children], job.owner, job.finished_at)
    current.responses.discard(response_id(job.id), job.owner)
    return Response(status=204)


@routes.get("/<job_id>/stream")
@describe(
    "Stream a job",
    responses={204: None},
    streams=FORMATS,
    errors=(404, 406, 410, 422),
    parameters=(openapi.LAST_EVENT_ID, openapi.STARTING_AFTER),
)
def stream_job(job_id: str) -> Response:
    """The events of the job: first those that exist, then new ones as they occur, until the job ends.

    The `Accept` header selects the format: `text/event-stream` (default) or `application/x-ndjson`. Any number of
    clients can read a stream, and each can resume it after any event with `Last-Event-ID` or `starting_after`.

    The status is 204 if no events will follow; a browser's EventSource then stops reconnecting. It is 410 if the events
    after the cursor are no longer stored (`log_expired`) or are incomplete (`log_trimmed`). The job still has its text.

    While the queue is unavailable, an EventSource that reconnects gets a stream without events, because it would not
    reconnect after an error. Other clients get 503.
    """
    form = negotiate(request.accept_mimetypes)
    cursor = _cursor()
    try:
        return _stream(job_id, form, cursor)
    except redis.RedisError as error:
        if passes(error) and _is_reconnecting_event_source(form):
            log.warning("stream_postponed", extra={"job_id": job_id, "reason": str(error)})
            return reconnect_response(form, quote(job_id))  # the id is unverified: it could break the stream's format
        raise


def _stream(job_id: str, form: Format, cursor: int) -> Response:
    jobs, views, owner = services().jobs, services().job_views, caller().id
    job, archived = services().history.get(job_id, visible_owner())
    if job.status.terminal and cursor >= job.last_event:
        return Response(status=204)
    if archived is not None:
        raise Gone("The events of the job are no longer stored. The job has its text.", code="log_expired")
    environ = request.environ

    def respond() -> Response:
        return stream_response(
            services().follower.follow(job_id, cursor, partial(watch_disconnect, environ)),
            form,
            job_id,
            lambda: views.job_json(jobs.latest(job)),
            services().metrics,
        )

    return services().open_responses.respond(owner, environ.get(CONNECTION), respond)


def _is_reconnecting_event_source(form: Format) -> bool:
    """Whether the client may be a browser's EventSource that has received events before."""
    return isinstance(form, EventStream) and bool(request.headers.get(_LAST_EVENT_ID))


def _cursor() -> int:
    """Return the number of the last event received.

    Last-Event-ID takes precedence: an EventSource that reconnects sends it along with the original query parameters.
    """
    starting_after = parse_integer("starting_after", request.args.get("starting_after", "0"))
    last = request.headers.get(_LAST_EVENT_ID)
    return parse_integer(_LAST_EVENT_ID, last) if last else starting_after


def find_jobs(query: MultiDict[str, str], limit: int) -> HistoryPage:
    """Return the page of jobs that query parameters of the route select."""
    owners, wanted, before = _owners(query), _filter(query), _time(query, "before")
    recent = _recent_jobs(owners, wanted, limit, before)
    of_all = query.get("key") == ALL_KEYS
    return services().history.extend(recent, None if of_all else owners, wanted, limit, before)


def _recent_jobs(owners: list[str], wanted: JobFilter, limit: int, before: float | None) -> JobPage:
    if wanted == JobFilter() and len(owners) == 1:
        jobs = services().jobs.recent(owners[0], limit=limit, before=before)
        return JobPage(jobs, jobs[-1].created_at if len(jobs) == limit else None)
    return services().job_search.page(owners, wanted, limit=limit, before=before)


def _owners(query: MultiDict[str, str]) -> list[str]:
    """Return the ids of the API keys whose jobs the request asks for."""
    key = query.get("key", caller().id)
    if key == caller().id:
        return [key]
    require_scope("admin")
    return [*services().keys.entries()] if key == ALL_KEYS else [key]


def _filter(query: MultiDict[str, str]) -> JobFilter:
    status, priority = query.get("status"), query.get("priority")
    return JobFilter(
        status=None if status is None else _member("status", status, {each.value: each for each in Status}),
        model=query.get("model"),
        priority=None if priority is None else _member("priority", priority, {each.label: each for each in Priority}),
        after=_time(query, "after"),
        metadata=_metadata(query.getlist("metadata")),
    )


def _member(name: str, text: str, members: Mapping[str, T]) -> T:
    if text not in members:
        raise Invalid(f"{name} must be one of {', '.join(members)}.", field=name)
    return members[text]


def _metadata(texts: Sequence[str]) -> dict[str, str]:
    """Return the names and values to search for. Each is a condition of its own, so their number is limited."""
    if len(texts) > MAX_METADATA:
        raise Invalid(f"metadata can be given at most {MAX_METADATA} times: no job has more.", field="metadata")
    return dict(map(_pair, texts))


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise Invalid("metadata must have the form name=value.", field="metadata")
    return name, value


def _time(query: MultiDict[str, str], name: str) -> float | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e11:
        source = "the value of next from the previous page" if name == "before" else "a time in seconds since the epoch"
        raise Invalid(f"{name} must be {source}.", field=name)
    return seconds


def _wait(job: Job, max_wait_s: float) -> Job:
    """Wait for a job to end; return its latest state. If the key has too many waiting requests, do not wait."""
    with suppress(RateLimited):
        return _wait_or_refuse(job, max_wait_s)
    return job


def _wait_or_refuse(job: Job, max_wait_s: float) -> Job:
    if job.status.terminal or not max_wait_s:
        return job
    current, environ = services(), request.environ
    with current.open_responses.open(job.owner, environ.get(CONNECTION)):
        current.follower.wait(job.id, max_wait_s, watch=partial(watch_disconnect, environ))
    return current.jobs.latest(job)


def _job_response(job: Job) -> Response:
    return _json(services().job_views.job_json(job), 200 if job.status.terminal else 202)


def _json(body: str, status: int = 200) -> Response:
    return Response(body, status, content_type="application/json")
