"""The error that a job which ended without success is for its client."""

from __future__ import annotations

from typing import Final

from shared.errors import Conflict, Expired, Internal, Invalid, JobFailure, MlxqError, NotFound
from shared.jobs.record import Job, Status

_CAUSED_BY_MODEL: Final = {JobFailure.MODEL: NotFound, JobFailure.LOAD: Invalid}
_CAUSED_BY_REQUEST: Final = frozenset({JobFailure.CONTEXT_LENGTH, JobFailure.TEMPLATE})


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
