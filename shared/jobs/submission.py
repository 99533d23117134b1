"""What the API hands to the queue: a job to be accepted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Final

from shared.jobs.inputs import result_bytes
from shared.jobs.limits import STANDARD, OwnerLimits
from shared.jobs.record import Parsing, Priority
from shared.jobs.request import GENERATE, RERANK, Request, pack_tokens
from shared.wire import to_json

GROWTH_BYTES: Final = 128
"""Bytes that a generated token may add to Redis: its event, its text, and the overhead of the stream."""
LOGPROB_BYTES: Final = 96
"""Bytes that one log-probability with its token's text adds to an event."""
DELTA_BYTES: Final = 64
"""Bytes that a token adds if it is written a second time, as a part of a message."""
RECORD_BYTES: Final = 2048
"""Bytes that a job occupies in addition to request and answer."""
USUAL_DIMENSIONS: Final = 4096
"""Dimensions for which memory is reserved if those of the model are not known."""
NO_WEBHOOKS: Final = "-"


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be accepted.

    Attributes:
        start_within_s, deadline_s: time limits in seconds from now; None for the defaults.
        fingerprint: hash of the request body; distinguishes a repeated request from another one with the same
            Idempotency-Key, and finds the job of a request whose connection was lost.
        images: number of images stored under the job's id (`shared.jobs.images`).
        image_bytes: their total size.
        image_tokens: their tokens in addition to one placeholder each; 0 if not known.
        prefixes: hashes of the prompt's prefixes, longest first, by which claims find a worker with a cached prefix.
        tokens: token ids of the prompt; None if the API does not have the model's tokenizer.
        shared: number of leading tokens whose cache other API keys may reuse.
        limits: what the owner may use.
        reserved_tokens: tokens of the answer for which memory in Redis is reserved; None for `max_tokens`.
        reader: id of the API process that waits for the job (`shared.jobs.readers`); empty if a lost connection does
            not matter.
        webhook: JSON of the `url` and the `events` of the job's webhooks; empty if only registered endpoints receive
            its events, `NO_WEBHOOKS` if nobody does.
        repeats_prompt: whether this is a further choice of the previous submission; its prompt then counts once.
        in_background: whether the job generates a background response, whose end causes a webhook event.
        min_retention_s: minimum time for which the finished job and its log are kept, if settings are shorter.
        result_bytes: maximum size of the results of inputs as text; 0 for generation jobs.
    """

    request: Request
    owner: str
    priority: Priority = Priority.NORMAL
    metadata: dict[str, str] = field(default_factory=dict)
    request_id: str = ""
    idempotency_key: str = ""
    start_within_s: float | None = None
    deadline_s: float | None = None
    fingerprint: str = ""
    images: int = 0
    image_bytes: int = 0
    image_tokens: int = 0
    prefixes: tuple[str, ...] = ()
    tokens: tuple[int, ...] | None = None
    shared: int = 0
    limits: OwnerLimits = STANDARD
    reserved_tokens: int | None = None
    reader: str = ""
    webhook: str = ""
    repeats_prompt: bool = False
    in_background: bool = False
    traceparent: str = ""
    tracestate: str = ""
    min_retention_s: int = 0
    result_bytes: int = 0

    @property
    def prompt_tokens(self) -> int | None:
        """Number of tokens of the prompt, with its images as far as they are known; None if it is not tokenised yet."""
        return None if self.tokens is None else len(self.tokens) + self.image_tokens


def inputs_bytes(request: Request, dimensions: int | None) -> int:
    """Return the maximum size of the results of a request's inputs as text; 0 for a generation job.

    Args:
        dimensions: of the model's vectors; None if unknown.
    """
    size = 1 if request.kind == RERANK else request.dimensions or dimensions or USUAL_DIMENSIONS
    return result_bytes([size] * len(request.inputs))


def job_arguments(submission: Submission) -> tuple[dict[str, int], str, str]:
    """Return the numbers that `enqueue.lua` needs of a job, the request's text, and its packed tokens."""
    request = submission.request
    text = request.to_json()
    tokens = "" if submission.tokens is None else pack_tokens(submission.tokens)
    numbers = {
        "images": submission.images,
        "request_bytes": len(text.encode()) + len(tokens) + submission.image_bytes,
        "growth_bytes": RECORD_BYTES + _answer_bytes(submission),
        "shared": submission.shared,
        "tokens": _expected_tokens(submission),
    }
    return numbers, text, tokens


def record_fields(submission: Submission, log_retention_s: int) -> dict[str, str]:
    """Return the record fields that the script does not set itself."""
    request = submission.request
    return {
        "metadata": json.dumps(submission.metadata),
        "request_id": submission.request_id,
        "log_retention_s": str(max(log_retention_s, submission.min_retention_s)),
        "size": str(_expected_tokens(submission)),
        **(_sampling(request) if request.kind == GENERATE else {"kind": request.kind}),
        **_optional(submission),
    }


def _answer_bytes(submission: Submission) -> int:
    """Return how many bytes the answer may add to Redis. Results are stored twice: as text, and in the log."""
    request = submission.request
    return _token_bytes(request) * (submission.reserved_tokens or request.max_tokens) + 2 * submission.result_bytes


def _token_bytes(request: Request) -> int:
    """Return how many bytes a generated token may add to Redis."""
    logprob_bytes = 0 if request.logprobs is None else LOGPROB_BYTES * (1 + request.logprobs)
    return GROWTH_BYTES + logprob_bytes + (DELTA_BYTES if request.parse == "message" else 0)


def _sampling(request: Request) -> dict[str, str]:
    return {"sampling": to_json({"max_tokens": request.max_tokens, **asdict(request.sampling)})}


def _optional(submission: Submission) -> dict[str, str]:
    """Return the record fields that only some jobs have."""
    request = submission.request
    fields = {name: value for name in ("webhook", "traceparent", "tracestate") if (value := getattr(submission, name))}
    if request.adapter is not None:
        fields["adapter"] = request.adapter
    if submission.in_background:
        fields["response"] = "1"
    if submission.repeats_prompt:
        fields["repeats_prompt"] = "1"
    if submission.prefixes:
        fields["prefixes"] = " ".join(submission.prefixes)
    if request.logprobs is not None:
        fields["logprobs"] = "1"
    if request.parse is not None:
        images = request.image_parts
        size = (images[-1]["width"], images[-1]["height"]) if images else None
        fields["parsing"] = Parsing(request.parse, size, request.coordinates).to_json()
    return fields


def _expected_tokens(submission: Submission) -> int:
    """Estimate how many tokens of worker memory the job needs at first: the prompt and the start of the answer."""
    request, prompt_tokens = submission.request, submission.prompt_tokens
    if prompt_tokens is None:
        messages = (str(message["content"]) for message in request.messages or ())
        characters = len(request.prompt or "") + sum(map(len, (*messages, *request.inputs)))
        prompt_tokens = characters // 4 + submission.image_tokens
    return prompt_tokens + min(request.max_tokens, 256)
