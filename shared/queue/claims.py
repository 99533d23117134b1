"""A worker's side of the queue (lease, claim, append, release), and the reaper, which recovers jobs of lost workers.

Every write is fenced by the attempt number and the time of the claim, and may be sent twice.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from shared.errors import JobFailure
from shared.jobs.log import join_tokens
from shared.jobs.record import EndedJob, Ending, Job, Status
from shared.jobs.request import Request, pack_tokens, unpack_tokens
from shared.queue import keys
from shared.queue.redis import Redis, script
from shared.wire import member, paired, to_json

log = logging.getLogger(__name__)


class NoLease(Exception):
    """The worker's lease has lapsed: it must renew before it may claim."""


class WriteResult(StrEnum):
    """The answer to a write. An unknown answer, from a newer version's script, counts as `ok`."""

    OK = "ok"
    CANCELLED = "cancelled"
    """Written; the job was cancelled and must stop."""
    EXPIRED = "expired"
    """Written; the job's time is over and it must stop."""
    FENCED = "fenced"
    """Not written: the job belongs to another attempt, or has ended. Drop it."""


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that a worker has reserved.

    Attributes:
        job: its record; `attempt` is the number that this claim's attempt will have.
        tokens: token ids of its prompt; None when they are not known yet.
        shared: number of its first tokens that other API keys may reuse.
        rank: its place in the queue; lower ones are served first.
        age_s: seconds since it was accepted, by Redis's clock at the claim.
    """

    job: Job
    request: Request
    tokens: tuple[int, ...] | None
    shared: int
    rank: float
    age_s: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What a worker asks for in a claim.

    Attributes:
        rows: jobs that it can admit now, beyond those it has claimed.
        tokens: tokens of prompts and answers for which it has memory now.
        spare: further jobs that it may claim to have at hand; less than 0 when it has too many.
        waiting: ids it has claimed and cannot admit now: other workers may take them, and it may claim a job that is to
            be served before one of them as if that were not here.
    """

    rows: int
    tokens: int
    spare: int = 0
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a claim.

    Attributes:
        jobs: what was reserved.
        lost: those of `Demand.waiting` that this worker does not hold any more.
        again_s: seconds after which a job that is deferred to another worker may be claimed; None: there is none.
    """

    jobs: tuple[ClaimedJob, ...]
    lost: tuple[str, ...] = ()
    again_s: float | None = None


@dataclass(frozen=True, slots=True)
class Append:
    """What one or several engine steps produced for one job.

    Attributes:
        claimed_at: when it was claimed, as in its record.
        start: whether the job was admitted to the batch; this begins its attempt.
        prompt: token ids of its prompt, if this worker tokenised it; they are stored for later attempts.
        n: number of the job's next event, which carries `text`; if Redis has lost one before it, nothing is written.
        tokens: token ids of `text`; a later attempt prefills them to continue.
        extra: further members of the event's JSON object, without braces; empty: none.
        ending: set when the job ends with this.
    """

    job_id: str
    attempt: int
    claimed_at: str
    n: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    extra: str = ""
    start: bool = False
    prompt: tuple[int, ...] | None = None
    ending: Ending | None = None

    def to_json(self) -> str:
        """The script's argument for a row."""
        row: dict[str, Any] = {"id": self.job_id, "attempt": self.attempt, "claimed_at": self.claimed_at}
        if self.start:
            row["start"] = True
        if self.prompt is not None:
            row["prompt"] = pack_tokens(self.prompt)
        if self.text or self.ending is not None:
            row["n"] = self.n
        if self.text:
            row |= {"text": self.text, "tokens": join_tokens(self.tokens)}
            if self.extra:
                row["extra"] = self.extra
        if self.ending is not None:
            row["ending"] = self.ending.to_fields()
        return to_json(row)


@dataclass(frozen=True, slots=True)
class Held:
    """A job that is in this worker's batch according to Redis."""

    job_id: str
    attempt: int
    claimed_at: str
    stop_as: WriteResult | None


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a renewal: whether the lease had held until now, and what the worker holds.

    Attributes:
        reserved: (id, claimed_at) of the jobs it has claimed and not admitted.
    """

    unbroken: bool
    running: tuple[Held, ...]
    reserved: tuple[tuple[str, str], ...]


class Claims:
    """One worker's side of the queue. Methods raise `redis.RedisError` when Redis is away."""

    def __init__(self, client: Redis, worker: str) -> None:
        self._worker = worker
        self._claim = script(client, "claim")
        self._append = script(client, "append")
        self._renew = script(client, "renew")
        self._release = script(client, "release")
        self._retire = script(client, "retire")

    def claim(self, model: str, demand: Demand, beside: Iterable[str] = ()) -> Claim:
        """Reserve waiting jobs of a model.

        Args:
            beside: the workers of this process, this one among them.

        Raises:
            NoLease: renew first.
        """
        ask = asdict(demand) | {"model": model, "worker": self._worker, "beside": [*{self._worker, *beside}]}
        reply = self._claim(args=[json.dumps(ask)])
        if reply == "no lease":
            raise NoLease(self._worker)
        now, again_s, lost, *claimed = reply
        jobs = tuple(job for each in claimed if (job := self._read(*each, now=float(now))) is not None)
        return Claim(jobs, tuple(lost), float(again_s) if again_s else None)

    def _read(self, record: list[str], request: list[str], score: str, *, now: float) -> ClaimedJob | None:
        """Read a claimed job. One that cannot be read fails here; otherwise every worker that claims it would fail."""
        fields = paired(record)
        try:
            return _claimed(fields, paired(request), float(score), now)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            log.exception("job_not_read", extra={"job_id": fields.get("id")})
        ending = Ending(
            Status.FAILED,
            error_code=JobFailure.ENGINE,
            error_message="The job's record cannot be read. Submit it again.",
        )
        attempt = int(fields["attempt"]) + 1
        self.append([Append(fields["id"], attempt, fields["claimed_at"], 0, start=True, ending=ending)])
        return None

    def append(self, rows: Sequence[Append]) -> list[WriteResult]:
        """Write all rows in one call; a result for each."""
        return [
            member(WriteResult, word, WriteResult.OK) for word in self._append(args=[row.to_json() for row in rows])
        ]

    def renew(self, seconds: float) -> Lease:
        """Extend the lease by that much from now."""
        unbroken, running, reserved = self._renew(args=[self._worker, seconds])
        held = zip(running[::4], running[1::4], running[2::4], running[3::4], strict=True)
        return Lease(
            unbroken=bool(unbroken),
            running=tuple(Held(i, int(attempt), at, _stop(stop)) for i, attempt, at, stop in held),
            reserved=tuple(zip(reserved[::2], reserved[1::2], strict=True)),
        )

    def release(self, jobs: Iterable[tuple[str, str]]) -> list[str]:
        """Give up (job id, claimed_at)s, to be continued by any worker; the models that have waiting jobs now."""
        flat = [part for job in jobs for part in job]
        return list(self._release(args=[self._worker, *flat])) if flat else []

    def retire(self) -> list[str]:
        """Return all jobs to the queue and end the lease; the models that have waiting jobs now."""
        return list(self._retire(args=[self._worker]))


def _stop(word: str) -> WriteResult | None:
    return None if (write_result := member(WriteResult, word, WriteResult.OK)) is WriteResult.OK else write_result


def _claimed(fields: dict[str, str], asked: dict[str, str], rank: float, now: float) -> ClaimedJob:
    return ClaimedJob(
        job=Job.from_record(fields | {"attempt": str(int(fields["attempt"]) + 1)}),
        request=Request.from_json(asked["request"]),
        tokens=unpack_tokens(asked["tokens"]) if "tokens" in asked else None,
        shared=int(asked.get("shared") or 0),
        rank=rank,
        age_s=max(0.0, now - float(fields["created_at"])),
    )


REAP_S: Final = 1.0
"""Longest time between two passes of a process. `reap.lua` takes a gap of twice this time for an outage."""
_MOST_EXPIRED: Final = 1000
_MOST_ENDS: Final = 1000


class Reaper:
    """Returns the jobs of lapsed leases to the queue and expires late jobs. Any number may run at once.

    Args:
        max_deaths: process deaths that a job may cause before it fails.
        failed_request_bytes: what the kept requests of failed jobs may occupy.

    Attributes:
        rest_s: seconds until the next pass is due: when the first lease lapses, if that is soon.
    """

    def __init__(self, client: Redis, max_deaths: int, failed_request_bytes: int) -> None:
        self.rest_s = REAP_S
        self._client = client
        self._reap = script(client, "reap")
        self._max_deaths = max_deaths
        self._failed_request_bytes = failed_request_bytes

    def reap(self) -> list[str]:
        """Make one pass; the models to which it returned jobs."""
        self.rest_s = REAP_S
        lapses_s, *models = self._reap(args=[self._max_deaths, _MOST_EXPIRED, self._failed_request_bytes])
        if lapses_s:
            # All processes wait for the same moment; the first one does the work, and jitter spreads the others.
            self.rest_s = min(REAP_S, max(0.05, float(lapses_s)) + random.uniform(0.002, 0.03))
        return list(models)

    def take_ends(self) -> list[EndedJob]:
        """The jobs that ended without their worker since the last call of any process."""
        return [EndedJob.from_json(text) for text in self._client.lpop(keys.ENDS, _MOST_ENDS) or ()]
