"""The job's record: its states, what is known of it, and how it ends."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, Self

from shared.jobs.attempts import Attempt, history
from shared.wire import known, member

OLD_REQUEST: Final = "generation"
"""Field of a record of the first layout that holds the request."""


class Status(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """It waits to be admitted to a worker's batch; also after its worker was lost or handed it back."""
    RUNNING = "running"
    """It is in a worker's batch, under the worker's lease."""
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

    @classmethod
    def read(cls, name: str, *, finished: bool) -> Status:
        """A record's status. One that only a newer process knows is taken for `failed` or `running`."""
        return member(cls, name, cls.FAILED if finished else cls.RUNNING)


class Priority(IntEnum):
    """Classes of the queue; a lower one is always served first."""

    HIGH = 0
    NORMAL = 1
    BATCH = 2

    @property
    def label(self) -> str:
        """Its name on the wire."""
        return self.name.lower()

    @classmethod
    def read(cls, number: int) -> Priority:
        """A record's class; one that only a newer process knows is taken for the nearest."""
        return cls(min(max(number, cls.HIGH), cls.BATCH))


@dataclass(frozen=True, slots=True)
class Parsing:
    """How the answer is parsed for its readers; see `web.results.job_views`.

    Attributes:
        format: what the request asked for, such as `ui_tars`.
        image_size: width and height in pixels of the request's last image; None without images.
    """

    format: str
    image_size: tuple[int, int] | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        size = data.get("image_size")
        return cls(**data | {"image_size": tuple(size) if size else None})


@dataclass(frozen=True, slots=True)
class Job:
    """A job's hot record: neither its request nor its text. Times are seconds since the epoch, durations seconds.

    Attributes:
        attempt: number of the newest attempt that was admitted; 0 before the first.
        claimed_at: when the newest claim was made, as text: it fences what the claim's holder writes.
        last_event: number of the newest event in the log.
        parsing: how the answer is parsed; None: not at all.
        history: the newest attempts, oldest first.
    """

    id: str
    owner: str
    model: str
    status: Status
    attempt: int
    claimed_at: str
    priority: Priority
    metadata: dict[str, str]
    request_id: str
    last_event: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    timings: dict[str, float]
    error_code: str | None
    error_message: str | None
    parsing: Parsing | None = None
    logprobs: bool = False
    """Whether its chunk events carry log-probabilities."""
    old_layout: bool = False
    """Whether the record is one of the first layout, which an old worker still runs."""
    history: tuple[Attempt, ...] = ()

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
            status=Status.read(record["status"], finished=bool(record.get("finished_at"))),
            attempt=int(record["attempt"]),
            claimed_at=record.get("claimed_at", ""),
            priority=Priority.read(int(record["class"])),
            metadata=json.loads(record["metadata"]),
            request_id=record["request_id"],
            last_event=int(record["seq"]),
            created_at=float(record["created_at"]),
            started_at=number("started_at"),
            finished_at=number("finished_at"),
            finish_reason=record.get("finish_reason"),
            prompt_tokens=count("prompt_tokens"),
            completion_tokens=count("completion_tokens"),
            cached_tokens=count("cached_tokens"),
            timings={name: float(record[name]) for name in TIMINGS if name in record},
            error_code=record.get("error_code"),
            error_message=record.get("error_message"),
            parsing=Parsing.from_json(record["parsing"]) if record.get("parsing") else None,
            logprobs="logprobs" in record,
            old_layout=OLD_REQUEST in record,
            history=history(record),
        )


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that ended without its worker: while it waited, or because its worker died."""

    id: str
    model: str
    status: Status
    error_code: str | None = None
    error_message: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `lib/job.lua` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        return cls(**data | {"status": Status.read(data["status"], finished=True)})


TIMINGS = ("queue_s", "prefill_s", "first_token_s", "total_s")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ends a job. The job's text is what its chunk events carried.

    Attributes:
        prompt_tokens, completion_tokens, cached_tokens: None: not known; completion tokens are then counted in the log.
    """

    status: Status
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
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
