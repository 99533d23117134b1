"""Usage of API keys, and their limits."""

from __future__ import annotations

from datetime import date
from typing import Literal, Self

from pydantic import Field

from shared.jobs.usage import Counters, UsageRow
from web.schemas.base import ResponseModel
from web.schemas.requests import PriorityName


class UsageCounters(ResponseModel):
    """Numbers of jobs that have ended, and of their tokens. Each job counts once, however often it was tried."""

    jobs: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    prompt_tokens: int = Field(description="The prompt of a request with several choices counts once")
    cached_tokens: int = Field(description="Prompt tokens that the prefix cache supplied")
    completion_tokens: int
    reasoning_tokens: int = Field(description="Completion tokens of reasoning")

    @classmethod
    def of(cls, counters: Counters, **more: object) -> Self:
        """Describe counters, with further fields of a subclass."""
        return cls(
            jobs=counters.jobs,
            succeeded=counters.succeeded,
            failed=counters.failed,
            cancelled=counters.cancelled,
            expired=counters.expired,
            prompt_tokens=counters.prompt,
            cached_tokens=counters.cached,
            completion_tokens=counters.completion,
            reasoning_tokens=counters.reasoning,
            **more,
        )


class UsageEntry(UsageCounters):
    """What an API key used of a model on a day."""

    date: str = Field(description="Day in UTC, as `YYYY-MM-DD`")
    key: str = Field(description="Id of the API key")
    key_name: str
    model: str

    @classmethod
    def of_row(cls, row: UsageRow, key_name: str) -> Self:
        """Describe a row."""
        return cls.of(row.counters, date=row.day.isoformat(), key=row.key_id, key_name=key_name, model=row.model)


class UsageReport(ResponseModel):
    """Usage by day, API key and model, the newest day first. Days without usage are left out."""

    object: Literal["usage"] = "usage"
    start: date
    end: date
    data: list[UsageEntry]
    total: UsageCounters


class RequestLimit(ResponseModel):
    """The limit on requests. How much of it is left is in the headers of responses."""

    limit: str = Field(description="For requests other than GET, such as `100/minute`")


class TokensPerMinute(ResponseModel):
    """The limit on tokens per minute."""

    limit: int | None = Field(description="Null: unlimited")
    remaining: int | None
    reset_s: float = Field(description="Seconds until the whole limit is available, if no job is submitted")


class TokensPerDay(ResponseModel):
    """The limit on tokens per day."""

    limit: int | None = Field(description="Null: unlimited")
    used: int = Field(description="Tokens of jobs that ended since midnight UTC")
    reserved: int = Field(description="Tokens that unfinished jobs are expected to use; 0 without a token limit")
    remaining: int | None
    reset_s: float = Field(description="Seconds until midnight UTC")


class QueuedJobs(ResponseModel):
    """The limit on waiting jobs."""

    limit: int = Field(description="Maximum per model")
    used: dict[str, int] = Field(description="Waiting jobs by model")


class QueuedBytes(ResponseModel):
    """The limit on the Redis memory that unfinished jobs reserve."""

    limit: int | None = Field(description="Null: a share of the memory of Redis")
    used: int


class RunningJobs(ResponseModel):
    """The limit on running jobs of all models together; further jobs wait."""

    limit: int | None = Field(description="Null: unlimited")
    used: int


class LimitsView(ResponseModel):
    """The limits of an API key, and how much of them is in use."""

    object: Literal["limits"] = "limits"
    key: str = Field(description="Id of the API key")
    key_name: str
    weight: float = Field(description="The key's share of a model, relative to other keys with waiting jobs")
    max_priority: PriorityName
    requests: RequestLimit
    tokens_per_minute: TokensPerMinute
    tokens_per_day: TokensPerDay
    queued_jobs: QueuedJobs
    queued_bytes: QueuedBytes
    running_jobs: RunningJobs
