"""Jobs and answers, as clients read them."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from shared.jobs.record import AttemptEnd, Status
from web.schemas.base import ResponseModel
from web.schemas.requests import PriorityName


class Alternative(ResponseModel):
    """One of the likeliest tokens at a place of the text."""

    token: str
    logprob: float


class TokenLogprob(ResponseModel):
    """A token of the text with its log-probability, as the model gave it before sampling changed anything."""

    token: str = Field(description="Its text; U+FFFD stands for bytes that are no whole character")
    logprob: float
    bytes: list[int] | None = Field(None, description="Its bytes, where its text does not show them")
    top: list[Alternative] = Field([], description="The likeliest tokens at its place, best first")


_LOGPROBS_ABOUT = "With `logprobs`, once the job has ended and while its log is kept; else null"


class Output(ResponseModel):
    """The text so far, or in all."""

    text: str
    finish_reason: str | None = Field(description="`stop`, `length`, or null while it runs or when it was cut")
    logprobs: list[TokenLogprob] | None = Field(None, description=_LOGPROBS_ABOUT)


class PointView(ResponseModel):
    """A place in the last image of the request, in its own pixels."""

    x: float
    y: float
    inside: bool = Field(description="Whether the image has such a place")


class ActionView(ResponseModel):
    """One action of an answer of UI-TARS."""

    action: Literal[
        "click", "left_double", "right_single", "drag", "hotkey", "type", "scroll", "wait", "finished", "call_user"
    ]
    raw: str = Field(description="As the model wrote it")
    thought: str | None
    start: PointView | None = Field(description="Where; of a drag where from")
    end: PointView | None = Field(description="Of a drag: where to")
    key: str | None = Field(description="Of a hotkey: the keys, as `ctrl c`")
    text: str | None = Field(description="What to type (a newline at its end submits it), or what `finished` says")
    direction: Literal["up", "down", "left", "right"] | None


class Parsed(ResponseModel):
    """What `parse` found in an answer."""

    actions: list[ActionView] | None = Field(None, description="With `parse`, once the job has ended; else null")
    parse_error: str | None = Field(None, description="Why the text has no actions, or no more of them")


class Usage(ResponseModel):
    """Tokens, once they are counted."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


class Timings(ResponseModel):
    """Seconds; each is there once it is known."""

    queue_s: float | None = None
    prefill_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


class JobError(ResponseModel):
    """Why a job failed or expired."""

    code: str = Field(
        description="Stable. Of an expired job: `start_timeout` when it never started, `deadline_exceeded` when it was "
        "cut off. Of a failed one: `worker_lost`, `context_length_exceeded`, `template_error`, `generation_error`, "
        "`out_of_memory`, `engine_error`, `log_lost`, `image_lost`"
    )
    message: str


class AttemptView(ResponseModel):
    """One worker's try at a job. Times are seconds since the epoch."""

    attempt: int
    worker: str = Field(description="Tells workers apart; not a name that leads anywhere")
    started_at: float
    ended_at: float | None = Field(description="Null while it is under way")
    outcome: AttemptEnd | None = Field(
        description="`worker_lost`: it was lost with its worker; `handed_back` by a worker that had to stop; `ended`: "
        "the job ended with it; null while it is under way"
    )


class Urls(ResponseModel):
    """Where to go on."""

    self: str
    stream: str
    cancel: str


class JobView(Parsed):
    """A job as its owner sees it. Times are seconds since the epoch."""

    id: str
    object: Literal["job"] = "job"
    status: Status
    model: str
    attempt: int = Field(description="How often a worker has begun it")
    history: list[AttemptView] = Field(description="What became of its attempts; of more than 20, the newest")
    priority: PriorityName
    created_at: float
    started_at: float | None
    finished_at: float | None
    queue_position: int | None = Field(description="1 is next; null when it does not wait")
    estimated_start_s: float | None = Field(description="Seconds from now; null when that is not known")
    output: Output | None = Field(description="The text so far, or in all; null in lists while the job runs")
    usage: Usage
    timings: Timings
    error: JobError | None
    metadata: dict[str, str]
    urls: Urls


class JobList(ResponseModel):
    """A page of the caller's jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    next: str | None = Field(description="Value of `before` for the next page; null on the last")


class InferenceView(Parsed):
    """An answer in one piece."""

    id: str
    model: str
    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None = Field(None, description=_LOGPROBS_ABOUT)
    usage: Usage
    timings: Timings
