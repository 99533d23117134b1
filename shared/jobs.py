"""The job: what was asked, its states, its record in Redis, and everything the API does with it.

What a worker does with a job (claim, append, release) stands in `shared.claims`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Self

from shared import keys
from shared.attempts import Attempt, history
from shared.durability import ProvenScript
from shared.errors import Conflict, KeyReused, NotFound, Unavailable
from shared.images import SLACK_S
from shared.log import JobLog
from shared.settings import Settings
from shared.store import Redis, script
from shared.wire import known


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
class Sampling:
    """How the next token is chosen. Randomness is a function of (seed, position) alone."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be generated: `prompt`, or `messages` for the model's chat template."""

    model: str
    max_tokens: int
    sampling: Sampling
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    stop: tuple[str, ...] = ()
    parse: str | None = None
    """What its text is to be read as; see `web.views`."""
    share_system_prompt: bool = False
    """Whether jobs of other API keys may reuse what the model's cache has of the leading system message."""

    @property
    def image_parts(self) -> list[dict[str, Any]]:
        """The images of its messages in their order: of each the digest (`image`), `width` and `height` in pixels."""
        contents = (message["content"] for message in self.messages or ())
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return [part for part in parts if part["type"] == "image"]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        data["sampling"] = Sampling(**known(Sampling, data["sampling"]))
        data["stop"] = tuple(data["stop"])
        data["messages"] = None if data["messages"] is None else tuple(data["messages"])
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job about to be accepted. Times are seconds from now."""

    generation: Generation
    owner: str
    priority: Priority = Priority.NORMAL
    metadata: dict[str, str] = field(default_factory=dict)
    request_id: str = ""
    idempotency_key: str = ""
    start_within_s: float | None = None
    deadline_s: float | None = None
    fingerprint: str = ""
    """Hash of what the request means: tells a repeated request from another one under the same key."""
    images: int = 0
    """How many were put under its id (`shared.images`)."""
    marks: tuple[str, ...] = ()
    """Hashes of its beginnings, of the longest first: by them the claim finds the worker that has its prefix."""


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
    generation: Generation
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
            generation=Generation.from_json(record["generation"]),
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


def new_job_id() -> str:
    """`job_` and 28 hex digits; ids sort by the moment they were made, and so do jobs of the same turn."""
    return f"job_{time.time_ns():016x}{secrets.token_hex(6)}"


def fingerprint(request: bytes) -> str:
    """A short hash that tells one request from another."""
    return hashlib.blake2b(request, digest_size=16).hexdigest()


class Jobs:
    """The jobs in Redis, as their owners see them.

    Every method raises `redis.RedisError` when Redis is away.
    """

    def __init__(self, client: Redis, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._log = JobLog(client)
        self._enqueue = ProvenScript(client, "enqueue") if settings.durable else script(client, "enqueue")
        self._stop = script(client, "stop")
        self._forget = script(client, "forget")

    def create(self, submission: Submission, job_id: str | None = None) -> tuple[Job, bool]:
        """Accept a job: from here on it is durable, and waits in line.

        Args:
            job_id: of `new_job_id`, where something was kept under it already.

        Returns:
            The job, and whether it is new (not the answer to a repeated Idempotency-Key).

        Raises:
            KeyReused: the Idempotency-Key came before, with another body.
            Unavailable: the queue is full, or has not the job's images.
            NotDurable: Redis does not prove that it keeps the job.
        """
        limits, generation = self._settings, submission.generation
        record = {
            "generation": generation.to_json(),
            "metadata": json.dumps(submission.metadata),
            "request_id": submission.request_id,
            "log_retention_s": str(limits.log_retention_s or limits.retention_s),
            **({"marks": " ".join(submission.marks)} if submission.marks else {}),
        }
        job_id = job_id or new_job_id()
        word, *flat = self._enqueue(
            args=[
                job_id,
                submission.owner,
                generation.model,
                int(submission.priority),
                limits.retention_s,
                submission.idempotency_key,
                submission.fingerprint,
                limits.max_queue,
                submission.start_within_s or limits.start_within_s,
                submission.deadline_s or limits.deadline_s,
                submission.images,
                SLACK_S,
                *(part for pair in record.items() for part in pair),
            ]
        )
        if word == "full":
            raise Unavailable("Too many jobs wait for this model.", code="queue_full", retry_after=10)
        if word == "reused":
            raise KeyReused("This Idempotency-Key was used for another request.", field="Idempotency-Key")
        if word == "images":
            raise Unavailable("The queue has lost the images of this request. Send it again.", retry_after=1)
        job = Job.from_record(dict(zip(flat[::2], flat[1::2], strict=True)))
        return job, job.id == job_id  # "exists" may also be the answer to this very call, sent again

    def known(self, owner: str, idempotency_key: str) -> bool:
        """Whether an owner's Idempotency-Key stands for a job already."""
        return bool(idempotency_key) and bool(self._client.exists(f"{keys.IDEM}{owner}:{idempotency_key}"))

    def get(self, job_id: str, owner: str) -> Job:
        """An owner's job.

        Raises:
            NotFound: there is none, or it is another's.
        """
        record = self._client.hgetall(keys.JOB + job_id)
        if not record or record["owner"] != owner:
            raise NotFound("There is no such job.", code="job_not_found")
        return Job.from_record(record)

    def recent(self, owner: str, *, limit: int, before: float | None = None) -> list[Job]:
        """An owner's jobs, newest first, created before a moment (seconds since the epoch)."""
        own = keys.OWNER + owner
        highest = "+inf" if before is None else f"({before!r}"
        while True:
            ids = self._client.zrange(own, highest, "-inf", byscore=True, desc=True, offset=0, num=limit)
            records = self._read(ids)
            gone = [job_id for job_id, record in zip(ids, records, strict=True) if not record]
            if not gone:
                return [Job.from_record(record) for record in records]
            self._client.zrem(own, *gone)  # and again, or the page would look like the last

    def stop(self, job_id: str, owner: str) -> Job:
        """Cancel a job: at once while it waits, at its worker's next step while it runs.

        Raises:
            NotFound: there is none, or it is another's.
            Conflict: it has ended.
        """
        self.get(job_id, owner)
        word = self._stop(args=[job_id, Status.CANCELLED])
        job = self.get(job_id, owner)
        if word == "ended" and job.status is not Status.CANCELLED:
            raise Conflict(f"The job has ended already: {job.status}.", code="job_ended")
        return job

    def forget(self, job_id: str, owner: str) -> None:
        """Delete a job that has ended.

        Raises:
            NotFound: there is none, or it is another's.
            Conflict: it has not ended.
        """
        self.get(job_id, owner)
        if self._forget(args=[job_id]) == "active":
            raise Conflict("The job has not ended; cancel it first.", code="job_active")

    def text(self, job: Job) -> str:
        """The text generated so far, or in all.

        Raises:
            Gone: only the job's log has it, and that was trimmed.
        """
        return job.text if job.text is not None else self._log.written(job.id, job.last_event).text

    def position(self, job: Job) -> int | None:
        """How many jobs are served before this one, plus one; None when it does not wait."""
        return self.positions([job]).get(job.id)

    def positions(self, jobs: Iterable[Job]) -> dict[str, int]:
        """For each job that waits, by id: how many are served before it, plus one."""
        waiting = [job for job in jobs if job.status is Status.QUEUED]
        if not waiting:
            return {}
        with self._client.pipeline(transaction=False) as pipe:
            for job in waiting:
                pipe.zrank(keys.QUEUE + job.model, job.id)
            ranks = pipe.execute()
        return {job.id: rank + 1 for job, rank in zip(waiting, ranks, strict=True) if rank is not None}

    def _read(self, ids: Iterable[str]) -> list[dict[str, str]]:
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(keys.JOB + job_id)
            return list(pipe.execute())
