"""Submit a job for the HTTP request that is being served. All routes that generate text start here."""

from __future__ import annotations

from flask import request

from shared.jobs.store import Accepted, fingerprint
from web.access.auth import caller
from web.admission.admit import RequestContext
from web.http.body import release as release_body
from web.http.request import idempotency_key, uploads
from web.http.request_id import current_request_id
from web.http.threadpool import run_in_threadpool
from web.schemas.requests import JobRequest
from web.services import services


def submit(job_request: JobRequest) -> Accepted:
    """Accept a job for the caller, or find the job that the same request created before.

    Raises:
        Invalid: the request cannot be run; nothing was enqueued.
        Forbidden: the API key may not use the priority.
        RateLimited: the API key has too many waiting jobs.
        Unavailable: the queue is full.
    """
    api_key, key = caller(), idempotency_key()
    owner = api_key.id
    loaded = services().image_loader.load(
        job_request, uploads(), caller=owner, is_repeated=lambda: services().jobs.key_is_used(owner, key)
    )
    context = RequestContext(
        owner=owner,
        request_id=current_request_id(),
        idempotency_key=key,
        fingerprint=_fingerprint(loaded.fingerprint_source) if key else "",
        max_queued=api_key.max_queued,
        max_priority=api_key.max_priority,
    )
    accepted = services().admission.admit(loaded.request, context, loaded.files, skipped_images=loaded.skipped)
    release_body()
    if accepted.new:
        job = accepted.job
        services().metrics.submitted.labels(job.model, job.priority.label).inc()
    return accepted


def _fingerprint(job_request: JobRequest) -> str:
    """Hash the route and the request's meaning, not its bytes: a retry may format the same JSON differently."""
    path, size = request.path, request.content_length or 0
    model = services().catalog.resolve(job_request.model)
    model_id = model.id if model else None
    model_defaults = model.sampling.model_dump(exclude_none=True) if model else {}

    def compute() -> str:
        return fingerprint(f"{path}\n{job_request.canonical_json(model_id, model_defaults)}".encode())

    return run_in_threadpool(size, compute)
