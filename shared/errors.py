"""Exceptions that API callers see, and the stable codes of failed and expired jobs.

MlxqError                 carries `code`, HTTP `status`, `title`, `detail` and, for one field, `field`
├── BadRequest            400  the request body cannot be parsed
├── Unauthorized          401  the API key is missing or unknown
├── Forbidden             403  the API key may not do this, or a CSRF token is missing
├── NotFound              404  the route or the job does not exist, or the job belongs to another key
├── MethodNotAllowed      405  the route does not support the method
├── NotAcceptable         406  no response format matches the Accept header
├── RequestTimeout        408  the request arrives too slowly
├── Conflict              409  the operation is not possible in the current state
├── Gone                  410  the job's log or request is no longer stored
├── TooLarge              413  the request body exceeds the limit
├── UnsupportedMedia      415  the route does not accept the content type
├── Invalid               422  a field has an invalid value; `field` names it
│   └── KeyReused         422  the Idempotency-Key was used for a different request
├── HeadTooLarge          431  the request line or the headers are too long
├── RateLimited           429  the API key exceeded its limit on requests or tokens
│   └── KeyQueueFull      429  the API key reached its limit on waiting jobs or on memory
├── Internal              500  a bug in the service
├── Unavailable           503  a dependency is unreachable; retry after `retry_after` seconds
│   ├── NotDurable        503  Redis did not confirm that the job is on disk
│   ├── RedisUnsuitable   503  Redis cannot be used: it may evict jobs, or lacks something that the service needs
│   ├── QueueFull         503  the model's queue reached MAX_QUEUE
│   └── QueueMemoryFull   503  unfinished jobs reached QUEUE_BYTES, or Redis is out of memory
└── Expired               504  the job did not end within its time limit

A job's `error` carries a `JobFailure` code if it failed and an `Expiry` code if it expired. Tokenizers and model
runners raise `PromptRefused` with a `JobFailure` code: the API then rejects the request, or the claimer fails the job.

Exceptions that stay inside the service are defined in the module that raises them: `NoLease` (`shared.queue.claims`),
`ModelError` (`shared.models.folder`), `InvalidUrl` (`shared.redis.urls`), `TokenizerError`
(`shared.tokenizing.client`).
"""

from __future__ import annotations

from enum import StrEnum


class MlxqError(Exception):
    """An error that is shown to an API caller.

    Attributes:
        detail: one sentence that names the problem and, where there is one, the fix.
        code: stable identifier.
        field: the request field at fault, if it is a single one.
        retry_after: seconds after which the same request may succeed; None: retrying does not help.
    """

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
    """The request body cannot be parsed."""

    status, code, title = 400, "bad_request", "Bad request"


class Unauthorized(MlxqError):
    """The API key is missing or unknown."""

    status, code, title = 401, "unauthorized", "Unauthorized"


class Forbidden(MlxqError):
    """The API key lacks a scope."""

    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(MlxqError):
    """The resource does not exist, or belongs to another key."""

    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(MlxqError):
    """The route exists but does not support the method."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class NotAcceptable(MlxqError):
    """No response format matches the Accept header."""

    status, code, title = 406, "not_acceptable", "Not acceptable"


class RequestTimeout(MlxqError):
    """The request arrives too slowly."""

    status, code, title = 408, "request_timeout", "Request timeout"


class Conflict(MlxqError):
    """The operation is not possible in the current state."""

    status, code, title = 409, "conflict", "Conflict"


class Gone(MlxqError):
    """The job's log has expired (`log_expired`), or was trimmed and lacks events (`log_trimmed`)."""

    status, code, title = 410, "gone", "Gone"


class TooLarge(MlxqError):
    """The request body exceeds the limit."""

    status, code, title = 413, "body_too_large", "Body too large"


class UnsupportedMedia(MlxqError):
    """The route does not accept the content type."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class Invalid(MlxqError):
    """A field has an invalid value; `field` names it."""

    status, code, title = 422, "invalid_request", "Invalid request"


class KeyReused(Invalid):
    """The Idempotency-Key was used for a different request."""

    code = "idempotency_key_reused"


class HeadTooLarge(MlxqError):
    """The request line or the headers are too long."""

    status, code, title = 431, "head_too_large", "Request head too large"


class RateLimited(MlxqError):
    """The API key exceeded its limit on requests or tokens (`tokens_per_minute`, `tokens_per_day`)."""

    status, code, title = 429, "rate_limited", "Too many requests"


class KeyQueueFull(RateLimited):
    """The API key has too many waiting jobs (`MAX_QUEUE_PER_KEY`) or uses too much memory (`QUEUE_BYTES_PER_KEY`)."""

    code, title = "key_queue_full", "Too much queued"


class Internal(MlxqError):
    """A bug in the service; the request id leads to its log line."""


class Unavailable(MlxqError):
    """A dependency is unreachable; the request may be retried after `retry_after` seconds."""

    status, code, title = 503, "unavailable", "Service unavailable"


class NotDurable(Unavailable):
    """Redis did not confirm that the job is on disk. A retry with the same Idempotency-Key creates no second job."""

    code = "not_durable"


class RedisUnsuitable(Unavailable):
    """Redis must not hold jobs: it may evict them, or denies commands that the service needs."""

    code = "redis_unsuitable"


class QueueFull(Unavailable):
    """The model's queue reached its maximum length (`MAX_QUEUE`)."""

    code = "queue_full"


class QueueMemoryFull(Unavailable):
    """Unfinished jobs reached their share of memory (`QUEUE_BYTES`), or Redis is out of memory."""

    code = "queue_memory_full"


class Expired(MlxqError):
    """The job did not end within its time limit."""

    status, code, title = 504, "job_expired", "Out of time"


class JobFailure(StrEnum):
    """Why a job failed: the stable code in its `error`."""

    WORKER_LOST = "worker_lost"
    """It crashed its worker as often as `MAX_ATTEMPTS` allows."""
    CONTEXT_LENGTH = "context_length_exceeded"
    """The prompt exceeds the model's context."""
    TEMPLATE = "template_error"
    """The model's chat template rejected the messages."""
    CONSTRAINT = "constraint_error"
    """The answer's constraint (`response_format`, or the schema of a tool) cannot be honoured."""
    ROW = "generation_error"
    """Sampling or detokenising this job raised; other jobs in the batch were not affected."""
    MEMORY = "out_of_memory"
    """Prompt and answer need more memory than the worker has."""
    ENGINE = "engine_error"
    """The engine raised while it ran this job."""
    LOG_LOST = "log_lost"
    """The job was to be resumed, but its log no longer holds everything that was generated."""
    IMAGE_LOST = "image_lost"
    """An image of the job is no longer stored."""
    ADAPTER = "adapter_error"
    """The job's adapter is unknown, or cannot be used with the model."""
    MODEL = "model_not_found"
    """No worker has the model and no catalog lists it any more."""
    LOAD = "load_failed"
    """The model does not load, or no worker has enough memory for it."""


class PromptRefused(Exception):
    """The model cannot process a prompt: the request is rejected, or the job fails.

    The text is shown to the API caller.

    Attributes:
        code: a `JobFailure`.
        field: the request field at fault, if it is not the prompt.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class Expiry(StrEnum):
    """Why a job expired: the stable code in its `error`."""

    START = "start_timeout"
    """It never started. The limit is the smaller of `start_within_s` and `deadline_s`."""
    DEADLINE = "deadline_exceeded"
    """It started but did not end before its deadline, either running or queued again. Its text is incomplete."""
