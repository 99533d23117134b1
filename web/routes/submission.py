"""Submit the jobs of the HTTP request that is being served. All routes that create jobs start here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis
from flask import Response, request
from pydantic import BaseModel

from shared.errors import NotDurable, NotFound
from shared.jobs.limits import TokensExceeded
from shared.jobs.readers import reader_id
from shared.jobs.store import Accepted, fingerprint, new_job_id
from web.access import rate_limits
from web.access.auth import caller
from web.admission.admit import RequestContext
from web.admission.image_loader import LoadedRequest
from web.http.body import release as release_body
from web.http.environ import JOB_ID, QUEUE_POSITION
from web.http.request import idempotency_key, uploads
from web.http.request_id import current_request_id
from web.http.threadpool import run_in_threadpool
from web.http.tracing import TRACEPARENT, TRACESTATE
from web.schemas.inputs import InputsRequest
from web.schemas.requests import JobRequest
from web.services import services

_RETRY_COUNT: Final = "X-Stainless-Retry-Count"
"""Header of the official clients of OpenAI and Anthropic: how often the request was sent before."""


def submit(job_request: JobRequest) -> Accepted:
    """Accept a job for the caller, or find the job that the same request created before.

    Raises:
        Invalid: the request cannot be run; nothing was enqueued.
        Forbidden: the API key may not use the priority.
        RateLimited: the API key has reached one of its limits.
        Unavailable: the queue is full.
    """
    loaded = _load(job_request)
    return _admit([loaded], _context(_fingerprint(loaded.fingerprint_source) if idempotency_key() else ""))


def submit_choices(
    job_requests: Sequence[JobRequest] | Sequence[InputsRequest],
    choices: int,
    body: BaseModel,
    prepare: Callable[[str], object] = lambda _: None,
    *,
    in_background: bool = False,
) -> Accepted:
    """Accept `choices` jobs for each request, all or none; return the first job, whose children are the others.

    A client that repeats its request by itself finds the jobs of the first try if its connection was lost.

    Args:
        job_requests: what to generate; at most one of several requests has images.
        body: the request body, of which the jobs' requests are made.
        prepare: called with the first job's id right before the jobs are accepted.
        in_background: see `RequestContext`.

    Raises:
        MlxqError: as `submit`.
    """
    retries = retry_count()
    repeatable = retries is not None or idempotency_key()
    body_fingerprint = _body_fingerprint(body) if repeatable else ""
    if retries and not idempotency_key() and (joined := _rejoined(body_fingerprint)):
        return joined
    reader, job_id = "" if retries is None else reader_id(), new_job_id()
    loaded = [_load(each) for each in job_requests]
    try:
        context = _context(body_fingerprint, reader, job_id, prepare, in_background=in_background)
        return _admit(loaded, context, choices)
    except (NotDurable, redis.RedisError):
        if retries is not None:  # only such clients repeat the request without a key
            services().readers.submission_failed(caller().id, body_fingerprint, job_id)
        raise


def with_job_headers(response: Response, accepted: Accepted) -> Response:
    """Add the path of the job to a response, and whether an earlier request created the job."""
    response.headers["Location"] = f"/v1/jobs/{accepted.job.id}"
    if not accepted.new:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def retry_count() -> int | None:
    """Return how often the client has sent this request before; None if it does not say so."""
    text = request.headers.get(_RETRY_COUNT, "")
    return int(text) if re.fullmatch(r"\d{1,4}", text) else None


def _rejoined(body_fingerprint: str) -> Accepted | None:
    """Return the job of an earlier try whose connection was lost; None if there is none."""
    owner, readers = caller().id, services().readers
    job_id = readers.rejoin(owner, body_fingerprint) or readers.uncertain_job(owner, body_fingerprint)
    if job_id is None:
        return None
    try:
        job = services().jobs.get(job_id, owner)
    except NotFound:  # the earlier submission failed
        return None
    release_body()
    return Accepted(job, new=False, wake=False, place=None)


def _load(job_request: JobRequest | InputsRequest) -> LoadedRequest[Any]:
    owner, key = caller().id, idempotency_key()
    return services().image_loader.load(
        job_request, uploads(), caller=owner, is_repeated=lambda: services().jobs.key_is_used(owner, key)
    )


def _context(
    request_fingerprint: str,
    reader: str = "",
    job_id: str = "",
    prepare: Callable[[str], object] = lambda _: None,
    *,
    in_background: bool = False,
) -> RequestContext:
    api_key = caller()
    return RequestContext(
        owner=api_key.id,
        request_id=current_request_id(),
        idempotency_key=idempotency_key(),
        fingerprint=request_fingerprint,
        job_id=job_id,
        reader=reader,
        limits=api_key.limits,
        max_priority=api_key.max_priority,
        prepare=prepare,
        in_background=in_background,
        traceparent=request.environ.get(TRACEPARENT, ""),
        tracestate=request.environ.get(TRACESTATE, ""),
    )


def _admit(
    loaded: Sequence[LoadedRequest[Any]],
    context: RequestContext,
    choices: int = 1,
) -> Accepted:
    files = {digest: file for each in loaded for digest, file in each.files.items()}
    skipped = sum(each.skipped for each in loaded)
    try:
        accepted = services().admission.admit_all([each.request for each in loaded], context, files, skipped, choices)
    except TokensExceeded as refused:
        rate_limits.report_tokens(refused.left)
        raise
    release_body()
    request.environ[JOB_ID] = accepted.job.id
    if accepted.place is not None:
        request.environ[QUEUE_POSITION] = accepted.place.position
    rate_limits.report_tokens(accepted.tokens)
    if accepted.new:
        job = accepted.job
        services().metrics.submitted.labels(job.model, job.priority.label).inc(1 + len(job.children))
    return accepted


def _fingerprint(job_request: JobRequest) -> str:
    """Hash the route and the request's meaning, not its bytes: a retry may format the same JSON differently."""
    model, adapter = services().catalog.resolve_adapter(job_request.model)
    model_id = model.id if model else None
    defaults = services().admission.sampling_defaults(model_id or job_request.model)
    if model_id and adapter:
        model_id = f"{model_id}:{adapter}"
    model_defaults = defaults.model_dump(exclude_none=True)
    return _hash(lambda: job_request.canonical_json(model_id, model_defaults))


def _body_fingerprint(body: BaseModel) -> str:
    """Hash the route and the fields of a body."""
    return _hash(lambda: body.model_dump_json(exclude_unset=True))


def _hash(meaning: Callable[[], str]) -> str:
    path = request.path
    return run_in_threadpool(request.content_length or 0, lambda: fingerprint(f"{path}\n{meaning()}".encode()))
