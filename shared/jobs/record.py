"""The job's record: its states, what is known of it, and how it ends."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import Self

from shared.jobs.attempts import Attempt, history
from shared.jobs.request import Request


class Status(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """It waits for a slot; also after its worker was lost or handed it back."""
    RUNNING = "running"
    """A worker holds it under a lease."""
    SUCCEEDED = "succeeded"
    """It ended by itself: a stop, the end token, or max_tokens."""
    FAILED = "failed"
    """It cannot be done; `error` says why."""
    CANCELLED = "cancelled"
    """Its owner asked for the end; the text so far is kept."""
    EXPIRED = "expired"
    """It did not start, or not end, within its time; `error` says which, and the text so far is kept."""

    @property
    def terminal(self) -> bool:
        """Whether nothing follows any more."""
        return self not in (Status.QUEUED, Status.RUNNING)


class Priority(IntEnum):
    """Classes of the queue; a lower one is always served first."""

    HIGH = 0
    NORMAL = 1
    BATCH = 2

    @property
    def label(self) -> str:
        """Its name on the wire."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Job:
    """A job's record as it was read. Times are seconds since the epoch, durations seconds."""

    id: str
    owner: str
    model: str
    status: Status
    attempt: int
    claimed_at: str
    """When the newest attempt was claimed, to the letter: with its number it fences what the attempt writes."""
    priority: Priority
    alone: bool
    """Whether it runs without neighbours, because its next lost worker is its last."""
    generation: Request
    metadata: dict[str, str]
    request_id: str
    last_event: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    text: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    timings: dict[str, float]
    error_code: str | None
    error_message: str | None
    history: tuple[Attempt, ...] = ()
    """The newest attempts, oldest first."""

    @classmethod
    def from_record(cls, record: dict[str, str]) -> Self:
        """Read a record as Redis holds it."""

        def number(name: str) -> float | None:
            return float(record[name]) if record.get(name) else None

        def count(name: str) -> int | None:
            return int(record[name]) if record.get(name) else None

        return cls(
            id=record["id"],
            owner=record["owner"],
            model=record["model"],
            status=Status(record["status"]),
            attempt=int(record["attempt"]),
            claimed_at=record.get("claimed_at", ""),
            priority=Priority(int(record["class"])),
            alone="alone" in record,
            generation=Request.from_json(record["generation"]),
            metadata=json.loads(record["metadata"]),
            request_id=record["request_id"],
            last_event=int(record["seq"]),
            created_at=float(record["created_at"]),
            started_at=number("started_at"),
            finished_at=number("finished_at"),
            text=record.get("text"),
            finish_reason=record.get("finish_reason"),
            prompt_tokens=count("prompt_tokens"),
            completion_tokens=count("completion_tokens"),
            cached_tokens=count("cached_tokens"),
            timings={name: float(record[name]) for name in TIMINGS if name in record},
            error_code=record.get("error_code"),
            error_message=record.get("error_message"),
            history=history(record),
        )


TIMINGS = ("queue_s", "prefill_s", "first_token_s", "total_s")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ends a job. Without a text, the job's text and tokens are what its log has."""

    status: Status
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None
    error_message: str | None = None

    def to_fields(self) -> dict[str, str]:
        """The record fields it sets."""
        fields = asdict(self)
        timings = fields.pop("timings")
        return {
            **{name: str(value) for name, value in fields.items() if value is not None},
            **{name: f"{value:.6f}" for name, value in timings.items()},
        }
