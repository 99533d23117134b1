"""The response objects that the API returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from shared.errors import JobFailure
from shared.jobs.record import Job, Status
from web.responses.output import JOB_PREFIX
from web.responses.requests import ResponseRequest
from web.schemas.base import ResponseModel
from web.schemas.openai_fields import tier_of_priority

RESPONSE_PREFIX: Final = "resp_"
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
_STATUSES: Final[Mapping[Status, ResponseStatus]] = {
    Status.QUEUED: "queued",
    Status.RUNNING: "in_progress",
    Status.SUCCEEDED: "completed",
    Status.FAILED: "failed",
    Status.EXPIRED: "failed",
    Status.CANCELLED: "cancelled",
}
_PROMPT_CODE, _SERVER_CODE = "invalid_prompt", "server_error"
_CAUSED_BY_PROMPT: Final = frozenset({JobFailure.CONTEXT_LENGTH, JobFailure.TEMPLATE, JobFailure.CONSTRAINT})


class InputDetails(ResponseModel):
    """Parts of the prompt tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(ResponseModel):
    """Parts of the generated tokens."""

    reasoning_tokens: int


class ResponseUsage(ResponseModel):
    """The tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFailure(ResponseModel):
    """Why a response failed."""

    code: str = Field(description="One of OpenAI's codes")
    message: str


class IncompleteDetails(ResponseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseView(ResponseModel):
    """A response. Times are in seconds since the epoch."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="`resp_` and the digits of the id of the job")
    object: Literal["response"] = "response"
    created_at: float
    completed_at: float | None = None
    status: ResponseStatus
    background: bool
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[dict[str, Any]] = Field(description="The items, once the response has ended")
    usage: ResponseUsage | None = None
    instructions: str | None
    previous_response_id: str | None
    conversation: None = None
    prompt: None = None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    max_output_tokens: int | None
    max_tool_calls: int | None
    text: dict[str, Any]
    reasoning: dict[str, Any]
    temperature: float | None = Field(description="The one that was used; null if the job is of an earlier version")
    top_p: float | None
    top_logprobs: int | None
    truncation: Literal["disabled"] = "disabled"
    service_tier: str
    store: bool
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None


class DeletedResponse(ResponseModel):
    """Confirms that a response was deleted."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(ResponseModel):
    """A page of input items."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None = Field(description="To get the next page, pass it as `after`")
    has_more: bool


class InputTokenCount(ResponseModel):
    """The number of tokens of a prompt."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


def response_id(job_id: str) -> str:
    """Return the id of the response that a job generates."""
    return RESPONSE_PREFIX + job_id.removeprefix(JOB_PREFIX)


def job_id(response: str) -> str:
    """Return the id of the job that generates a response."""
    return JOB_PREFIX + response.removeprefix(RESPONSE_PREFIX)


def echoed_fields(request: ResponseRequest) -> dict[str, Any]:
    """Return the fields of a request that its response repeats."""
    limit = request.max_tool_calls if isinstance(request.max_tool_calls, int) else None
    choice = request.tool_choice
    return {
        "background": request.background,
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "tools": [_dumped(tool) for tool in request.tools],
        "tool_choice": choice if isinstance(choice, str) else _dumped(choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": limit,
        "text": {"format": _dumped(request.text.format), "verbosity": request.text.verbosity},
        "reasoning": {
            "effort": request.reasoning.effort,
            "summary": request.reasoning.summary or request.reasoning.generate_summary,
        },
        "top_logprobs": request.top_logprobs,
        "store": request.store,
        "metadata": request.metadata,
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def _dumped(model: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = model.model_dump(by_alias=True, exclude_none=True)
    # OpenAI's clients expect these two fields in every function.
    return {"parameters": None, "strict": False, **dumped} if dumped["type"] == "function" else dumped


def status_of(job: Job) -> ResponseStatus:
    """Return the status of a job's response."""
    if job.status is Status.QUEUED and job.started_at is not None:  # it waits for another worker
        return "in_progress"
    return "incomplete" if is_cut(job) else _STATUSES[job.status]


def is_cut(job: Job) -> bool:
    """Whether the answer ended at a limit of its length."""
    return job.status is Status.SUCCEEDED and job.finish_reason == "length"


def view(job: Job, echoed: Mapping[str, Any], status: ResponseStatus, output: Sequence[dict[str, Any]]) -> ResponseView:
    """Describe a response in a status that its job has, or had earlier."""
    sampling = job.sampling or {}
    ended = status not in ("queued", "in_progress")
    return ResponseView(
        **echoed,
        id=response_id(job.id),
        created_at=job.created_at,
        completed_at=job.finished_at if ended else None,
        status=status,
        error=_failure(job) if status == "failed" else None,
        incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
        model=job.model_name,
        output=[*output],
        usage=_usage(job) if ended else None,
        temperature=sampling.get("temperature"),
        top_p=sampling.get("top_p"),
        service_tier=tier_of_priority(job.priority),
    )


def _failure(job: Job) -> ResponseFailure:
    return ResponseFailure(
        code=_PROMPT_CODE if job.error_code in _CAUSED_BY_PROMPT else _SERVER_CODE,
        message=job.error_message or "The job failed.",
    )


def _usage(job: Job) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=job.prompt_tokens or 0,
        input_tokens_details=InputDetails(cached_tokens=job.cached_tokens or 0),
        output_tokens=job.completion_tokens or 0,
        output_tokens_details=OutputDetails(reasoning_tokens=job.reasoning_tokens or 0),
        total_tokens=(job.prompt_tokens or 0) + (job.completion_tokens or 0),
    )
