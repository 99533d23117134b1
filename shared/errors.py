"""The exceptions that mean something to a caller, and the codes that the wire carries.

MlxqError                 has `code`, `status` (HTTP), `title`, and perhaps `field`
├── BadRequest            400  a body that cannot be read at all
├── Unauthorized          401  no key, or not one of ours
├── Forbidden             403  a key without the scope
├── NotFound              404  no such job (or not the caller's), no such route
├── MethodNotAllowed      405
├── NotAcceptable         406
├── Conflict              409  not in this state
├── Gone                  410  a log that was trimmed or has expired
├── TooLarge              413  body over the limit
├── UnsupportedMedia      415
├── Invalid               422  a field that does not fit; `field` names it
│   └── KeyReused         422  Idempotency-Key sent again with another body
├── RateLimited           429
│   └── KeyQueueFull      429  the key's unfinished jobs hold as many bytes as one key may
├── Internal              500
├── Unavailable           503  Redis away: try again after `retry_after` seconds
│   ├── NotDurable        503  Redis does not prove that the job is on its disk
│   ├── QueueFull         503  as many jobs wait for the model as may
│   └── QueueMemoryFull   503  unfinished jobs hold as many bytes as they may, or Redis has no memory left
└── Expired               504  a job that was waited for did not end within its time

Codes in a job's `error`: `JobFailure` for failed jobs, `Expiry` for expired ones. `PromptRefused` carries a
`JobFailure` from tokenizers and model runners to the API or the claimer.
"""

from __future__ import annotations

from enum import StrEnum


class MlxqError(Exception):
    """An error that an API caller may see: stable `code`, HTTP `status`, one sentence, the field at fault."""

    status = 500
    code = "internal"
    title = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.field = field
        self.retry_after = retry_after


class BadRequest(MlxqError):
    """The body cannot be read at all."""

    status, code, title = 400, "bad_request", "Bad request"


class Unauthorized(MlxqError):
    """No API key, or not one of ours."""

    status, code, title = 401, "unauthorized", "Unauthorized"


class Forbidden(MlxqError):
    """The key lacks the scope."""

    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(MlxqError):
    """No such thing, or it belongs to another key."""

    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(MlxqError):
    """The route exists, the method does not."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class NotAcceptable(MlxqError):
    """No representation fits the Accept header."""

    status, code, title = 406, "not_acceptable", "Not acceptable"


class Conflict(MlxqError):
    """Not possible in the present state."""

    status, code, title = 409, "conflict", "Conflict"


class Gone(MlxqError):
    """A log that has expired (`log_expired`), or that was trimmed, so that events are missing (`log_trimmed`)."""

    status, code, title = 410, "gone", "Gone"


class TooLarge(MlxqError):
    """The body is over the limit."""

    status, code, title = 413, "body_too_large", "Body too large"


class UnsupportedMedia(MlxqError):
    """The content type is not one the route reads."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class Invalid(MlxqError):
    """A field that does not fit; `field` names it."""

    status, code, title = 422, "invalid_request", "Invalid request"


class KeyReused(Invalid):
    """An Idempotency-Key came again with another body."""

    code = "idempotency_key_reused"


class RateLimited(MlxqError):
    """Too many requests for this key."""

    status, code, title = 429, "rate_limited", "Too many requests"


class KeyQueueFull(RateLimited):
    """The unfinished jobs of this API key hold as many bytes as one key may (`QUEUE_BYTES_PER_KEY`)."""

    code, title = "key_queue_full", "Too much queued"


class Internal(MlxqError):
    """A fault of ours; the request id leads to the log line."""


class Unavailable(MlxqError):
    """Something the service needs is away; trying again later makes sense."""

    status, code, title = 503, "unavailable", "Service unavailable"


class NotDurable(Unavailable):
    """Redis does not prove that it keeps the job: sent again with its Idempotency-Key, it will be the same job."""

    code = "not_durable"


class QueueFull(Unavailable):
    """As many jobs wait for the model as may (`MAX_QUEUE`)."""

    code = "queue_full"


class QueueMemoryFull(Unavailable):
    """Unfinished jobs hold as many bytes as they may (`QUEUE_BYTES`), or Redis itself has no memory left."""

    code = "queue_memory_full"


class Expired(MlxqError):
    """The job that was waited for did not end within its time."""

    status, code, title = 504, "job_expired", "Out of time"


class JobFailure(StrEnum):
    """Why a job ended `failed`: the stable code in its `error`."""

    WORKER_LOST = "worker_lost"
    """It was lost with its worker as often as `MAX_ATTEMPTS` allows."""
    CONTEXT_LENGTH = "context_length_exceeded"
    """The prompt does not fit the model."""
    TEMPLATE = "template_error"
    """The model's chat template refused the messages."""
    ROW = "generation_error"
    """Its row of the batch raised (sampler, detokeniser); its neighbours went on."""
    MEMORY = "out_of_memory"
    """Its prompt and answer do not fit the worker's memory."""
    ENGINE = "engine_error"
    """The engine raised while working on it."""
    LOG_LOST = "log_lost"
    """It was to be continued, and what was generated before is not all in its log any more."""
    IMAGE_LOST = "image_lost"
    """An image of it is not kept any more."""


class PromptRefused(Exception):
    """A prompt that the model cannot take: its job fails, or is not accepted.

    `code` is a `JobFailure`; the text is shown to the caller of the API.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Expiry(StrEnum):
    """Why a job ended `expired`: the stable code in its `error`."""

    START = "start_timeout"
    """It never started: nothing was done of it. The limit is `start_within_s`, or `deadline_s` where that is less."""
    DEADLINE = "deadline_exceeded"
    """It had started, and was not done by its deadline, whether it ran then or waited again: its text is cut off."""
