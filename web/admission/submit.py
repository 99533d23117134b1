"""Accepting the job of the request being served: what the routes that take generation requests have in common."""

from __future__ import annotations

from flask import request

from shared.jobs.store import Accepted, fingerprint
from web.access.auth import caller
from web.admission.admit import Origin
from web.http.request import idempotency_key, uploads
from web.http.request_id import current_request_id
from web.http.threadpool import run_in_threadpool
from web.schemas.requests import JobRequest
from web.services import services


def submit(wanted: JobRequest) -> Accepted:
    """Accept a job for the caller.

    Raises:
        Invalid: it cannot be run as it is; nothing was enqueued.
        Unavailable: the queue is full.
    """
    key, owner = idempotency_key(), caller().id
    loaded = services().image_loader.load(
        wanted, uploads(), caller=owner, repeated=lambda: services().jobs.known(owner, key)
    )
    origin = Origin(
        owner=owner,
        request_id=current_request_id(),
        idempotency_key=key,
        fingerprint=_fingerprint(loaded.meant) if key else "",
    )
    accepted = services().admission.admit(loaded.request, origin, loaded.files, unread=loaded.unread)
    if accepted.new:
        job = accepted.job
        services().metrics.submitted.labels(job.model, job.priority.label).inc()
    return accepted


def _fingerprint(wanted: JobRequest) -> str:
    """Of what is asked and where, not of the bytes: who tries again may write the same JSON differently."""
    path, size = request.path, request.content_length or 0
    model = services().catalog.resolve(wanted.model)
    settled = model.sampling.model_dump(exclude_none=True) if model else {}
    return run_in_threadpool(
        size, lambda: fingerprint(f"{path}\n{wanted.meaning(model.id if model else None, settled)}".encode())
    )
