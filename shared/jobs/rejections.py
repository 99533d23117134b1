"""The errors for jobs that `enqueue.lua` rejects."""

from __future__ import annotations

from typing import Final, NoReturn

from shared.errors import Invalid, KeyQueueFull, KeyReused, QueueFull, QueueMemoryFull, Unavailable

RETRY_S: Final = 10
"""`retry_after` of requests that are rejected because the queue is full, in seconds."""


def reject(reason: str) -> NoReturn:
    """Raise the error for a reason that `enqueue.lua` returned."""
    match reason:
        case "reused":
            raise KeyReused(
                "This Idempotency-Key was used for another request. Use a new one.", field="Idempotency-Key"
            )
        case "images":
            raise Unavailable(
                "The images of this request were lost before it was accepted. Send it again.", retry_after=1
            )
        case "too large":
            detail = (
                "This job could exceed the memory per API key (QUEUE_BYTES_PER_KEY). Reduce max_tokens or the prompt."
            )
            raise Invalid(detail, code="job_too_large", field="max_tokens")
        case "owner queue full":
            raise KeyQueueFull(
                "This API key has too many waiting jobs for the model (MAX_QUEUE_PER_KEY). Try again later.",
                retry_after=RETRY_S,
            )
        case "owner full":
            raise KeyQueueFull(
                "This API key's unfinished jobs use all its memory (QUEUE_BYTES_PER_KEY). Try again later.",
                retry_after=RETRY_S,
            )
        case "full":
            raise QueueFull("The model's queue is full (MAX_QUEUE). Try again later.", retry_after=RETRY_S)
        case _:
            raise QueueMemoryFull(
                "The queue's memory is full (QUEUE_BYTES). Try again later.",
                retry_after=RETRY_S,
            )
