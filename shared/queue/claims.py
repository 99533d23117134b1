"""What a worker does with jobs: hold a lease, claim, write, hand back; and what anybody does about lost ones.

Every call is fenced by the attempt number the claim gave, and may be sent twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from shared.jobs.log import chunk_data, join_tokens
from shared.jobs.record import Ending, Job
from shared.queue.redis import Redis, script


class NoLease(Exception):
    """The worker's lease has lapsed: it must renew before it may claim."""


@dataclass(frozen=True, slots=True)
class Left:
    """A job that is left to the worker which has its beginning in its cache.

    Attributes:
        node: Celery's name for that worker.
        seconds: after so many anybody may have it.
    """

    job_id: str
    node: str
    seconds: float


class LeftToOthers(Exception):
    """All that waits is left to other workers, and whoever is told so sees to it that these jobs are started."""

    def __init__(self, jobs: Sequence[Left]) -> None:
        super().__init__(f"{len(jobs)} jobs are left to others")
        self.jobs = tuple(jobs)


class Verdict(StrEnum):
    """The answer to a write."""

    OK = "ok"
    CANCELLED = "cancelled"
    """Written; and the job is to be stopped."""
    EXPIRED = "expired"
    """Written; and the job's time is over."""
    FENCED = "fenced"
    """Not written: the job is another's now, or has ended. Drop it."""


@dataclass(frozen=True, slots=True)
class Append:
    """What one engine step, or several, gave for one job.

    Attributes:
        claimed_at: the moment of the attempt's claim, as its record has it.
        n: number of the chunk event that carries `text`; the next free one of the job.
        tokens: the ids that a later attempt prefills to go on behind `text`.
        ending: set when the job ends with this.
    """

    job_id: str
    attempt: int
    claimed_at: str
    n: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    ending: Ending | None = None

    @classmethod
    def of(cls, job: Job, n: int, text: str = "", tokens: tuple[int, ...] = (), ending: Ending | None = None) -> Append:
        """What the attempt that claimed `job` writes."""
        return cls(job.id, job.attempt, job.claimed_at, n, text, tokens, ending)

    def to_line(self) -> str:
        """The script's argument for a row: seven lines. One argument costs less than seven."""
        data = chunk_data(self.text) if self.text else ""
        ending = json.dumps(self.ending.to_fields()) if self.ending else ""
        return (
            f"{self.job_id}\n{self.attempt}\n{self.claimed_at}\n{self.n}\n{data}\n{join_tokens(self.tokens)}\n{ending}"
        )


@dataclass(frozen=True, slots=True)
class Held:
    """A job that Redis says the worker holds."""

    job_id: str
    attempt: int
    stop_as: Verdict | None


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a renewal: whether it had held until now, and what the worker holds."""

    unbroken: bool
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job that waits again and needs a ticket."""

    model: str
    job_id: str


class Claims:
    """One worker's side of the queue. Methods raise `redis.RedisError` when Redis is away."""

    def __init__(self, client: Redis, worker: str) -> None:
        self._worker = worker
        self._claim = script(client, "claim")
        self._append = script(client, "append")
        self._renew = script(client, "renew")
        self._release = script(client, "release")
        self._retire = script(client, "retire")

    def claim(self, model: str, beside: Iterable[str] = ()) -> Job | None:
        """Take the next job of a model; None when none waits that this worker may have now.

        Args:
            beside: the workers of other models that would end with this one's process.

        Raises:
            NoLease: renew first.
            LeftToOthers: tell them.
        """
        reply = self._claim(args=[model, self._worker, *beside])
        if reply == "no lease":
            raise NoLease(self._worker)
        if not reply or reply == "alone":
            return None
        if reply[0] == "left":
            left = zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
            raise LeftToOthers([Left(job_id, node, float(seconds)) for job_id, node, seconds in left])
        return Job.from_record(dict(zip(reply[::2], reply[1::2], strict=True)))

    def append(self, rows: Sequence[Append]) -> list[Verdict]:
        """Write all rows in one call; a verdict for each."""
        return [Verdict(word) for word in self._append(args=[row.to_line() for row in rows])]

    def renew(self, seconds: float) -> Lease:
        """Prove to be alive for that much longer."""
        unbroken, *rest = self._renew(args=[self._worker, seconds])
        held = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        return Lease(
            unbroken=bool(unbroken),
            held=tuple(Held(i, int(attempt), Verdict(stop) if stop else None) for i, attempt, stop in held),
        )

    def release(self, jobs: Iterable[tuple[str, int]], *, max_attempts: int | None = None) -> list[Waiting]:
        """Hand (job, attempt)s back, to be continued by whoever claims them next.

        Args:
            max_attempts: given, it counts as a loss: a job that was lost so often fails, as if its worker had died.
        """
        flat = [part for job in jobs for part in job]
        most_losses = "" if max_attempts is None else max_attempts
        return _waiting(self._release(args=[self._worker, most_losses, *flat])) if flat else []

    def retire(self, *, max_attempts: int | None = None) -> list[Waiting]:
        """Hand everything back and give the lease up: the last call of a worker. `max_attempts` as in `release`."""
        return _waiting(self._retire(args=[self._worker, "" if max_attempts is None else max_attempts]))


REAP_S = 1.0
"""Longest time between two passes of a process: `reap.lua` takes twice as long without any for an outage."""


class Reaper:
    """Takes back what lapsed leases held and expires what is over its time. Harmless when run by many at once.

    Attributes:
        rest_s: seconds until the next pass is due: when the first lease lapses, if that is soon.
    """

    def __init__(self, client: Redis, max_attempts: int) -> None:
        self.rest_s = REAP_S
        self._reap = script(client, "reap")
        self._max_attempts = max_attempts

    def reap(self) -> list[Waiting]:
        """One pass; the jobs returned need tickets."""
        self.rest_s = REAP_S
        lapses_s, *flat = self._reap(args=[self._max_attempts, 1000])
        if lapses_s:
            # All processes look forward to the same moment: the first to come does the work.
            self.rest_s = min(REAP_S, max(0.05, float(lapses_s)) + random.uniform(0.002, 0.03))
        return _waiting(flat)


def _waiting(flat: list[str]) -> list[Waiting]:
    return [Waiting(model, job_id) for model, job_id in zip(flat[::2], flat[1::2], strict=True)]
