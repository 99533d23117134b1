"""The worker's operations on the queue: lease, claim, append, release.

Every write is fenced by the attempt number and the time of the claim. Every call may be sent twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from shared.errors import JobFailure
from shared.jobs.log import join_tokens
from shared.jobs.record import Ending, Job, Status
from shared.jobs.request import Request, pack_tokens, unpack_tokens
from shared.redis.client import Redis, script
from shared.wire import enum_member, pairs_to_dict, to_json

log = logging.getLogger(__name__)


class NoLease(Exception):
    """The worker's lease has expired. It must be renewed before a claim."""


class WriteResult(StrEnum):
    """The result of a write. An unknown value is read as `ok`."""

    OK = "ok"
    CANCELLED = "cancelled"
    """Written; the job was cancelled and must stop."""
    EXPIRED = "expired"
    """Written; the job exceeded its time limit and must stop."""
    FENCED = "fenced"
    """Not written: the job belongs to another attempt or has ended, and this worker must drop it."""


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that a worker has reserved.

    Attributes:
        job: the record; its `attempt` is the number that the attempt will have when the job is admitted.
        tokens: token ids of the prompt; None if it has not been tokenised yet.
        shared: number of leading tokens whose cache other API keys may reuse.
        rank: score in the queue; lower scores are served first. -1: it is the turn of the job's class, so that it ranks
            before all others (`claim.lua`).
        age_s: seconds from acceptance to the claim, by Redis's clock.
    """

    job: Job
    request: Request
    tokens: tuple[int, ...] | None
    shared: int
    rank: float
    age_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """The free capacity that a worker wants to fill.

    Attributes:
        rows: number of jobs that it can admit now, in addition to those it has claimed.
        tokens: number of prompt and answer tokens that fit in its free memory.
        spare: number of jobs that it may claim ahead of capacity; negative if it holds too many.
        waiting: ids of claimed jobs that it cannot admit now. Other workers may take them over, and each one that ranks
            behind a queued job does not count against `spare` for that job.
        reserve: number of rows that jobs of the class `batch` leave free for others.
    """

    rows: int
    tokens: int
    spare: int = 0
    waiting: tuple[str, ...] = ()
    reserve: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """The result of a claim.

    Attributes:
        jobs: the reserved jobs.
        lost: ids from `Demand.waiting` that this worker no longer holds.
        again_s: seconds until a job that is deferred to another worker may be claimed; None if there is none.
    """

    jobs: tuple[ClaimedJob, ...]
    lost: tuple[str, ...] = ()
    again_s: float | None = None


@dataclass(frozen=True, slots=True)
class Append:
    """The output of one or more engine steps for one job.

    Attributes:
        claimed_at: time of the claim, as in the record.
        n: number of the job's next event, which carries `text`. Nothing is written if the log lacks an earlier event.
        tokens: token ids of `text`; a later attempt prefills them to resume.
        extra: further members of the event's JSON object, without braces.
        chunk: whether to write a chunk event although there is no text.
        start: whether the job was admitted to the batch, which starts the attempt.
        prompt: token ids of the prompt, if this worker tokenised it; stored for later attempts.
        ending: how the job ends; None while it runs.
    """

    job_id: str
    attempt: int
    claimed_at: str
    n: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    extra: str = ""
    chunk: bool = False
    start: bool = False
    prompt: tuple[int, ...] | None = None
    ending: Ending | None = None

    @property
    def has_chunk(self) -> bool:
        """Whether this output is a chunk event."""
        return self.chunk or bool(self.text)

    def to_json(self) -> str:
        """Encode as an argument of `append.lua`."""
        row: dict[str, Any] = {"id": self.job_id, "attempt": self.attempt, "claimed_at": self.claimed_at}
        if self.start:
            row["start"] = True
        if self.prompt is not None:
            row["prompt"] = pack_tokens(self.prompt)
        if self.has_chunk or self.ending is not None:
            row["n"] = self.n
        if self.has_chunk:
            row |= {"text": self.text, "tokens": join_tokens(self.tokens)}
            if self.extra:
                row["extra"] = self.extra
        if self.ending is not None:
            row["ending"] = self.ending.to_fields()
        return to_json(row)


@dataclass(frozen=True, slots=True)
class Held:
    """A job that Redis lists in this worker's batch.

    Attributes:
        stop_as: `CANCELLED` or `EXPIRED` if the job must stop.
    """

    job_id: str
    attempt: int
    claimed_at: str
    stop_as: WriteResult | None


@dataclass(frozen=True, slots=True)
class Lease:
    """The result of a renewal.

    Attributes:
        unbroken: whether the previous lease was still valid.
        running: the jobs in the worker's batch.
        reserved: (id, claimed_at) of jobs that the worker has claimed but not admitted.
    """

    unbroken: bool
    running: tuple[Held, ...]
    reserved: tuple[tuple[str, str], ...]


class Claims:
    """One worker's operations on the queue. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis, worker: str) -> None:
        self._worker = worker
        self._claim = script(client, "claim")
        self._append = script(client, "append")
        self._renew = script(client, "renew")
        self._release = script(client, "release")
        self._retire = script(client, "retire")

    def claim(self, model: str, demand: Demand, process_workers: Iterable[str] = ()) -> Claim:
        """Reserve queued jobs of a model.

        Args:
            process_workers: ids of all workers of this process; this worker need not be among them.

        Raises:
            NoLease: the lease has expired.
        """
        workers = [*{self._worker, *process_workers}]
        request = asdict(demand) | {"model": model, "worker": self._worker, "process_workers": workers}
        reply = self._claim(args=[json.dumps(request)])
        if reply == "no lease":
            raise NoLease(self._worker)
        now, again_s, lost, *claimed = reply
        jobs = tuple(job for entry in claimed if (job := self._read(*entry, now=float(now))) is not None)
        return Claim(jobs, tuple(lost), float(again_s) if again_s else None)

    def _read(self, record: list[str], request: list[str], score: str, *, now: float) -> ClaimedJob | None:
        """Parse a claimed job. An invalid record fails the job, or it would raise in every worker that claims it."""
        fields = pairs_to_dict(record)
        try:
            return _claimed(fields, pairs_to_dict(request), float(score), now)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            log.exception("job_not_read", extra={"job_id": fields.get("id")})
        ending = Ending(
            Status.FAILED,
            error_code=JobFailure.ENGINE,
            error_message="The stored job cannot be parsed. Submit it again.",
        )
        attempt = int(fields["attempt"]) + 1
        self.append([Append(fields["id"], attempt, fields["claimed_at"], 0, start=True, ending=ending)])
        return None

    def append(self, rows: Sequence[Append]) -> list[WriteResult]:
        """Write all rows in one call and return a result for each."""
        results = self._append(args=[row.to_json() for row in rows])
        return [enum_member(WriteResult, result, WriteResult.OK) for result in results]

    def renew(self, seconds: float) -> Lease:
        """Make the lease expire this many seconds from now."""
        unbroken, running, reserved = self._renew(args=[self._worker, seconds])
        held = zip(running[::4], running[1::4], running[2::4], running[3::4], strict=True)
        return Lease(
            unbroken=bool(unbroken),
            running=tuple(Held(i, int(attempt), at, _stop_as(stop)) for i, attempt, at, stop in held),
            reserved=tuple(zip(reserved[::2], reserved[1::2], strict=True)),
        )

    def release(self, jobs: Iterable[tuple[str, str]]) -> list[str]:
        """Return jobs to the queue.

        Args:
            jobs: (id, claimed_at) of each job.

        Returns:
            The models that have queued jobs because of it.
        """
        flat = [value for job in jobs for value in job]
        return list(self._release(args=[self._worker, *flat])) if flat else []

    def retire(self) -> list[str]:
        """Return all jobs to the queue and end the lease. Returns the models that have queued jobs because of it."""
        return list(self._retire(args=[self._worker]))


def _stop_as(value: str) -> WriteResult | None:
    result = enum_member(WriteResult, value, WriteResult.OK)
    return None if result is WriteResult.OK else result


def _claimed(fields: dict[str, str], request: dict[str, str], rank: float, now: float) -> ClaimedJob:
    return ClaimedJob(
        job=Job.from_record(fields | {"attempt": str(int(fields["attempt"]) + 1)}),
        request=Request.from_json(request["request"]),
        tokens=unpack_tokens(request["tokens"]) if "tokens" in request else None,
        shared=int(request.get("shared") or 0),
        rank=rank,
        age_s=max(0.0, now - float(fields["created_at"])),
    )
