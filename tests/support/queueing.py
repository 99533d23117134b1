"""Helpers to operate the queue step by step: submit, reserve, admit, write, expire a lease."""

from __future__ import annotations

from typing import Any

from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.queue.claims import Append, ClaimedJob, Claims, Demand, WriteResult
from shared.queue.recovery import Reaper
from shared.redis import keys
from shared.redis.client import Redis

MODEL = "m"
MUCH = 1_000_000
"""Free tokens of a worker in tests that do not concern memory."""
SUCCESS = Ending(Status.SUCCEEDED, finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def submission(
    owner: str = "a", model: str = MODEL, *, prompt: str = "hi", max_tokens: int = 10, **options: Any
) -> Submission:
    """Create a submission."""
    return Submission(Request(model, max_tokens, Sampling(0.0), prompt=prompt), owner, **options)


def submit(jobs: Jobs, owner: str = "a", **options: Any) -> Job:
    """Submit a job."""
    return jobs.create(submission(owner, **options)).job


def lease(client: Redis, name: str) -> Claims:
    """Create a worker with a lease."""
    claims = Claims(client, name)
    claims.renew(60)
    return claims


def reserved(worker: Claims, rows: int = 1, *, model: str = MODEL, **options: Any) -> list[ClaimedJob]:
    """Claim jobs for a worker with this many free rows."""
    return [*worker.claim(model, Demand(**{"rows": rows, "tokens": MUCH, **options})).jobs]


def taken(worker: Claims) -> ClaimedJob:
    """Claim one job."""
    (claimed,) = reserved(worker)
    return claimed


def row(claimed: ClaimedJob, n: int = 0, text: str = "", *tokens: int, **options: Any) -> Append:
    """Create the output of a step for a job; `n` is the event's number, by default the first after the admission."""
    job = claimed.job
    return Append(job.id, job.attempt, job.claimed_at, n or job.last_event + 2, text, tokens, **options)


def started(worker: Claims) -> ClaimedJob:
    """Claim one job and admit it to the batch."""
    claimed = taken(worker)
    assert worker.append([row(claimed, start=True)]) == [WriteResult.OK]
    return claimed


def end(worker: Claims, claimed: ClaimedJob, ending: Ending = SUCCESS) -> None:
    """End a running job."""
    assert worker.append([row(claimed, ending=ending)]) == [WriteResult.OK]


def run(worker: Claims) -> ClaimedJob:
    """Claim, admit and end one job."""
    claimed = started(worker)
    end(worker, claimed)
    return claimed


def held(claimed: ClaimedJob) -> tuple[str, str]:
    """Return a claim as an argument of `Claims.release`."""
    return claimed.job.id, claimed.job.claimed_at


def lapse(client: Redis, worker: str) -> None:
    """Let a worker's lease expire now."""
    client.zadd(keys.LEASES, {worker: 1.0})


def age(client: Redis, job: Job, seconds: float) -> None:
    """Move a job's creation and deadline into the past; its place in the queue does not change."""
    for name in ("created_at", "end_by"):
        time = float(client.hget(keys.JOB + job.id, name))
        client.hset(keys.JOB + job.id, name, f"{time - seconds:.6f}")
    client.zincrby(keys.TIMERS, -seconds, job.id)


def kinds(client: Redis, job: Job) -> list[str]:
    """Return the kinds of the events in a job's log."""
    return [str(event.kind) for event in JobLog(client).read(job.id)]


def make_reaper(client: Redis, max_deaths: int = 3, failed_request_bytes: int = 2**20) -> Reaper:
    """Create a reaper with default limits."""
    return Reaper(client, max_deaths, failed_request_bytes)


def reap(client: Redis, max_deaths: int = 3) -> list[str]:
    """Make one pass of a reaper."""
    return make_reaper(client, max_deaths).reap()
