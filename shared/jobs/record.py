"""The job's record in Redis: status, attempts, result and ending."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Final, Self

from shared.jobs.request import GENERATE
from shared.wire import enum_member, known_fields

_ATTEMPT: Final = "attempt:"
OLD_REQUEST: Final = "generation"
"""Record field that holds the request in the first layout."""


class Status(StrEnum):
    """A job's state."""

    QUEUED = "queued"
    """It waits to be admitted to a worker's batch, for the first time or again."""
    RUNNING = "running"
    """It is in a worker's batch, under the worker's lease."""
    SUCCEEDED = "succeeded"
    """Generation ended: a stop string, the end token, or max_tokens."""
    FAILED = "failed"
    """It could not be completed; `error` says why."""
    CANCELLED = "cancelled"
    """Its owner cancelled it; the generated text is kept."""
    EXPIRED = "expired"
    """It did not start or end in time; `error` says which. The generated text is kept."""

    @property
    def terminal(self) -> bool:
        """Whether the state is final."""
        return self not in (Status.QUEUED, Status.RUNNING)

    @classmethod
    def read(cls, name: str, *, finished: bool) -> Status:
        """Parse a record's status. A status that only newer processes know is read as `failed` or `running`."""
        return enum_member(cls, name, cls.FAILED if finished else cls.RUNNING)


class Priority(IntEnum):
    """Classes of the queue; lower numbers are always served first."""

    HIGH = 0
    NORMAL = 1
    BATCH = 2

    @property
    def label(self) -> str:
        """The name in the API."""
        return self.name.lower()

    @classmethod
    def read(cls, number: int) -> Priority:
        """Parse a record's class. A class that only newer processes know is read as the nearest known one."""
        return cls(min(max(number, cls.HIGH), cls.BATCH))


@dataclass(frozen=True, slots=True)
class Parsing:
    """How the API parses the answer; see `web.results.job_views`.

    Attributes:
        format: the requested format, such as `ui_tars`.
        image_size: width and height of the request's last image in pixels; None without images.
        coordinates: what the coordinates refer to: `thousandths` of the image, pixels of the image as `resized` by the
            model, or `pixels` of the image as it was sent. None or another value: what is usual for the model's type.
    """

    format: str
    image_size: tuple[int, int] | None = None
    coordinates: str | None = None

    def to_json(self) -> str:
        """Encode as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the output of `to_json`, also that of another version."""
        data = known_fields(cls, json.loads(text))
        size = data.get("image_size")
        return cls(**data | {"image_size": tuple(size) if size else None})


class AttemptEnd(StrEnum):
    """How an attempt ended. A value that only newer processes know is read as `handed_back`: the job continued."""

    WORKER_LOST = "worker_lost"
    """Its worker crashed or no longer knew the job; counts towards `MAX_ATTEMPTS`."""
    HANDED_BACK = "handed_back"
    """Its worker returned the job to the queue."""
    ENDED = "ended"
    """The job ended."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a job. Times are seconds since the epoch, by Redis's clock.

    Attributes:
        number: 1, 2, 3…: the fencing token of its writes.
        worker: id of the worker that ran it.
        ended_at, how: None while it runs.
    """

    number: int
    worker: str
    started_at: float
    ended_at: float | None = None
    how: AttemptEnd | None = None

    @classmethod
    def from_json(cls, number: int, text: str) -> Self:
        """Parse an attempt that has ended, as `lib/job.lua` stores it."""
        entry = json.loads(text)
        how = enum_member(AttemptEnd, entry["how"], AttemptEnd.HANDED_BACK)
        return cls(number, entry["worker"], float(entry["started_at"]), float(entry["ended_at"]), how)


@dataclass(frozen=True, slots=True)
class Job:
    """A job's record, without its request and its text. Times are seconds since the epoch, durations are seconds.

    Attributes:
        attempt: number of the current or last attempt; 0 before the first.
        claimed_at: time of the last claim as text, which fences writes of earlier claims.
        last_event: number of the last event in the log.
        stop_string: the stop string that ended the text; None if none did.
        parsing: how the answer is parsed; None if it is not.
        logprobs: whether chunk events carry log-probabilities.
        old_layout: whether the record has the first layout and an old worker is running the job.
        history: the last attempts, oldest first.
        children: ids of the jobs with the further choices of the same request. They are cancelled and deleted together
            with this job.
        reasoning_tokens: see `Ending`.
        sampling: `max_tokens` and the fields of `Sampling`, with all defaults; None in records of earlier versions.
        adapter: name of the adapter with which the model generates; empty for none.
        traceparent, tracestate: W3C trace context of the job's HTTP request; empty if it is not traced.
        archived: whether the record comes from the archive.
        kind: of the request; see `shared.jobs.request`.
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
    stop_string: str | None = None
    parsing: Parsing | None = None
    logprobs: bool = False
    old_layout: bool = False
    history: tuple[Attempt, ...] = ()
    children: tuple[str, ...] = ()
    reasoning_tokens: int | None = None
    sampling: dict[str, Any] | None = None
    traceparent: str = ""
    tracestate: str = ""
    archived: bool = False
    kind: str = GENERATE
    adapter: str = ""

    @property
    def model_name(self) -> str:
        """The model as requests can name it, with its adapter."""
        return f"{self.model}:{self.adapter}" if self.adapter else self.model

    @classmethod
    def from_record(cls, record: dict[str, str]) -> Self:
        """Parse a record."""

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
            stop_string=record.get("stop_string"),
            parsing=Parsing.from_json(record["parsing"]) if record.get("parsing") else None,
            logprobs="logprobs" in record,
            old_layout=OLD_REQUEST in record,
            history=_history(record),
            children=tuple(record.get("children", "").split()),
            reasoning_tokens=count("reasoning_tokens"),
            sampling=json.loads(record["sampling"]) if record.get("sampling") else None,
            traceparent=record.get("traceparent", ""),
            tracestate=record.get("tracestate", ""),
            kind=record.get("kind", GENERATE),
            adapter=record.get("adapter", ""),
        )


def _history(record: Mapping[str, str]) -> tuple[Attempt, ...]:
    """Return the attempts that the record keeps, oldest first: the last ones that ended, and the one that runs."""
    ended = {int(name.removeprefix(_ATTEMPT)): text for name, text in record.items() if name.startswith(_ATTEMPT)}
    attempts = tuple(Attempt.from_json(number, ended[number]) for number in sorted(ended))
    if not record.get("worker") or record["status"] != Status.RUNNING:  # a reserved job has no attempt yet
        return attempts
    started_at = float(record.get("admitted_at") or record.get("claimed_at") or record["started_at"])
    return (*attempts, Attempt(int(record["attempt"]), record["worker"], started_at))


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that ended without a worker: while it was queued, or because its worker crashed."""

    id: str
    model: str
    status: Status
    error_code: str | None = None
    error_message: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse an entry written by `lib/job.lua`, also that of another version."""
        data = known_fields(cls, json.loads(text))
        return cls(**data | {"status": Status.read(data["status"], finished=True)})


TIMINGS = ("queue_s", "prefill_s", "first_token_s", "total_s")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ends a job. The text is not part of it: the chunk events carry it.

    Attributes:
        stop_string: the stop string that ended the text; None if none did.
        prompt_tokens, cached_tokens: None if unknown.
        reasoning_tokens: completion tokens of reasoning; None unless the text is parsed as a message.
        completion_tokens: None if unknown; the tokens are then counted in the log.
    """

    status: Status
    finish_reason: str | None = None
    stop_string: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None
    error_message: str | None = None

    def to_fields(self) -> dict[str, str]:
        """Return the record fields to set."""
        fields = asdict(self)
        timings = fields.pop("timings")
        return {
            **{name: str(value) for name, value in fields.items() if value is not None},
            **{name: f"{value:.6f}" for name, value in timings.items()},
        }
