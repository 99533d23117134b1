"""The errors for jobs that `enqueue.lua` rejects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from shared.errors import (
    Invalid,
    KeyQueueFull,
    KeyReused,
    MlxqError,
    QueueFull,
    QueueMemoryFull,
    Unavailable,
)
from shared.jobs.limits import TokensExceeded, TokensLeft

RETRY_S: Final = 10.0
"""`retry_after` of requests that are rejected because the queue is full, while nothing has been measured."""

_FAULTS: Final[Mapping[str, Invalid]] = {
    "reused": KeyReused("This Idempotency-Key was used for another request. Use a new one.", field="Idempotency-Key"),
    "too large": Invalid(
        "This job could exceed the memory per API key (QUEUE_BYTES_PER_KEY or its own limit). Reduce max_tokens or "
        "the prompt.",
        code="job_too_large",
        field="max_tokens",
    ),
}
"""Requests that would be rejected again."""
_LATER: Final[Mapping[str, tuple[type[MlxqError], str]]] = {
    "owner queue full": (
        KeyQueueFull,
        "This API key has too many waiting jobs for the model (MAX_QUEUE_PER_KEY or its own limit). Try again later.",
    ),
    "owner full": (
        KeyQueueFull,
        "This API key's unfinished jobs use all its memory (QUEUE_BYTES_PER_KEY or its own limit). Try again later.",
    ),
    "full": (QueueFull, "The model's queue is full (MAX_QUEUE). Try again later."),
}
"""Requests that may succeed later."""
_TOKENS: Final[Mapping[str, tuple[str, str]]] = {
    "tokens per minute": (
        "tokens_per_minute",
        "This API key has used its tokens per minute (TOKENS_PER_MINUTE_PER_KEY or its own limit). Try again later.",
    ),
    "tokens per day": (
        "tokens_per_day",
        "This API key has used its tokens per day, with its unfinished jobs (TOKENS_PER_DAY_PER_KEY or its own limit).",
    ),
}
"""Codes and details of requests that exceed a token limit."""


def reject(reason: str, wait_s: str = "", tokens: Sequence[str] = ()) -> NoReturn:
    """Raise the error for a reason that `enqueue.lua` returned.

    Args:
        wait_s: seconds after which a retry may succeed; empty if nothing was measured.
        tokens: what is left of the token limits; empty if the key has none.
    """
    if reason in _FAULTS:
        fault = _FAULTS[reason]
        raise type(fault)(fault.detail, code=fault.code, field=fault.field)
    if reason == "images":
        detail = "The images of this request were lost before it was accepted. Send it again."
        raise Unavailable(detail, retry_after=1)
    retry_after = float(wait_s or RETRY_S)
    if reason in _TOKENS:
        code, detail = _TOKENS[reason]
        exceeded = TokensExceeded(detail, code=code, retry_after=retry_after)
        exceeded.left = TokensLeft.from_reply(tokens)
        raise exceeded
    memory_full = (QueueMemoryFull, "The queue's memory is full (QUEUE_BYTES). Try again later.")
    kind, detail = _LATER.get(reason, memory_full)
    raise kind(detail, retry_after=retry_after)
