"""Batches, in OpenAI's format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from web.schemas.base import RequestModel, ResponseModel
from web.schemas.requests import Metadata

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank"]


class ExpiresAfter(RequestModel):
    """When the result files of a batch are deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=30 * 24 * 3600)


class BatchRequest(RequestModel):
    """A file of requests to run."""

    input_file_id: str = Field(
        min_length=1,
        max_length=64,
        description="A file with purpose `batch`: at most 50,000 lines, each with `custom_id`, `method`, `url`, `body`",
    )
    endpoint: BatchEndpoint = Field(description="The route to which all requests are addressed")
    completion_window: str = Field(
        pattern=r"^[1-9]\d{0,6}[smhd]$",
        description="Time within which the batch must end, for example `24h`. Requests that have not ended by then "
        "expire",
    )
    metadata: Metadata = Field({}, description="Strings that are stored and returned with the batch")
    output_expires_after: ExpiresAfter | None = Field(
        None, description="Lifetime of the result files. At most FILES_RETENTION_S, which is the default"
    )


class BatchErrorView(ResponseModel):
    """Why a batch failed, or is paused."""

    code: str
    message: str
    line: int | None = Field(description="Line of the input file, from 1")
    param: str | None


class BatchErrors(ResponseModel):
    """The errors of a batch; at most 100 lines are listed."""

    object: Literal["list"] = "list"
    data: list[BatchErrorView]


class RequestCounts(ResponseModel):
    """The requests of a batch."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(ResponseModel):
    """Parts of the prompt tokens."""

    cached_tokens: int


class OutputTokensDetails(ResponseModel):
    """Parts of the generated tokens."""

    reasoning_tokens: int


class BatchUsage(ResponseModel):
    """The tokens of all requests that succeeded."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchView(ResponseModel):
    """A batch. Times are in seconds since the epoch; they are null until the batch has the status."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = Field(description="The model that all requests name; null if they name several")
    errors: BatchErrors | None = Field(
        description="Invalid lines if the batch failed; `disk_full` while it waits for space to write its results"
    )
    input_file_id: str
    completion_window: str
    status: str = Field(
        description="`validating`, `failed`, `in_progress`, `finalizing`, `completed`, `expired`, `cancelling` or "
        "`cancelled`"
    )
    output_file_id: str | None = Field(description="The responses, once the batch has ended")
    error_file_id: str | None = Field(description="The requests that failed, once the batch has ended")
    created_at: int
    in_progress_at: int | None
    expires_at: int = Field(description="The end of the completion window")
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str]


class BatchList(ResponseModel):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchView]
    first_id: str | None
    last_id: str | None = Field(description="To get the next page, pass it as `after`")
    has_more: bool
