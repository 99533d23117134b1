"""`/v1/jobs/{id}/request`, `/images` and `/retry`: the stored request of a job, and running it again."""

from __future__ import annotations

from dataclasses import asdict, replace

from flask import Blueprint, Response

from shared.errors import Conflict, Forbidden, Gone, NotFound
from shared.image_files import media_type
from shared.jobs.record import Job
from shared.jobs.stored_requests import StoredRequest
from web.access.auth import caller, visible_owner
from web.archive.history import stored_request
from web.archive.tables import ArchivedJob
from web.http.openapi import describe
from web.http.request_id import current_request_id
from web.routes.submission import with_job_headers
from web.schemas.jobs import JobView, StoredRequestView
from web.services import services

routes = Blueprint("job_requests", __name__, url_prefix="/v1/jobs")


@routes.get("/<job_id>/request")
@describe("Get the request of a job", responses={200: StoredRequestView}, errors=(404, 410))
def get_request(job_id: str) -> Response:
    """The prompt or the messages, and all parameters with their defaults.

    A request is stored until its job ends. Requests of failed jobs are kept; with `KEEP_REQUESTS=all` those of all
    jobs, as far as `FAILED_REQUEST_BYTES` allows. The archive keeps requests, without images, if `ARCHIVE_CONTENT` is
    `all`. `PROMPT_ACCESS` says who can read them.
    """
    view = request_view(*services().history.get(job_id, visible_owner()))
    return Response(view.model_dump_json(), content_type="application/json")


@routes.get("/<job_id>/images/<name>")
@describe("Get an image of a job", responses={200: "image/*"}, errors=(404, 410))
def get_image(job_id: str, name: str) -> Response:
    """An image of the job's request. It is stored as long as the request."""
    job = services().jobs.get(job_id, visible_owner())
    require_prompt_access(job)
    stored = services().stored_requests
    if all(part["image"] != name for part in stored.get(job).request.image_parts):
        raise NotFound("The job's request has no such image.")
    image = stored.images(job, [name])[name]
    response = Response(image, content_type=media_type(image))
    response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    response.headers["Cache-Control"] = "private, max-age=600"
    return response


@routes.post("/<job_id>/retry")
@describe("Run a job again", responses={202: JobView}, errors=(404, 409, 410, 422))
def retry_job(job_id: str) -> Response:
    """Submits the stored request of a job that has ended as a new job of the same API key.

    It has the same priority, metadata, webhook and seed, and the default time limits. The earlier job stays as it is.
    """
    job, archived = services().history.get(job_id, visible_owner())
    submission, new_id = services().stored_requests.repeat(job, current_request_id(), lambda: _stored(job, archived))
    limits = services().keys.limits_of(job.owner)
    if limits is None:
        raise Conflict("The API key that submitted the job is revoked.", code="key_revoked")
    accepted = services().admission.repeat(replace(submission, limits=limits), new_id)
    services().metrics.submitted.labels(job.model, job.priority.label).inc()
    response = Response(services().job_views.accepted_json(accepted), 202, content_type="application/json")
    return with_job_headers(response, accepted)


def request_view(job: Job, archived: ArchivedJob | None) -> StoredRequestView:
    """Return the stored request of a job that the caller may see.

    Args:
        archived: what the archive has of the job, if it is not in Redis.

    Raises:
        Forbidden: the setting PROMPT_ACCESS does not allow it.
        Gone: it is not stored any more.
    """
    require_prompt_access(job)
    stored = _stored(job, archived)
    options = asdict(stored.request)
    messages = options.pop("messages")
    return StoredRequestView(
        id=job.id,
        prompt=options.pop("prompt"),
        messages=None if messages is None else list(messages),
        options=options,
        prompt_tokens=None if stored.tokens is None else len(stored.tokens),
    )


def require_prompt_access(job: Job) -> None:
    """Refuse to show the prompt of a job to the caller if PROMPT_ACCESS says so.

    Raises:
        Forbidden: the caller may not read it.
    """
    access = services().settings.prompt_access
    if access == "none" or (access == "owner" and job.owner != caller().id):
        raise Forbidden("PROMPT_ACCESS does not allow this API key to read prompts of this job.")


def _stored(job: Job, archived: ArchivedJob | None) -> StoredRequest:
    """Return the stored request of a job: from Redis, or else from the archive.

    Raises:
        Gone: neither has it.
    """
    current = services()
    if archived is None:
        try:
            return current.stored_requests.get(job)
        except Gone:
            archived = current.history.archived(job.id, job.owner)
            if archived is None:
                raise
    return StoredRequest(stored_request(archived), None, 0)
