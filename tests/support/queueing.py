"""The queue as tests drive it by hand: submit, reserve, admit, write, lapse."""

from __future__ import annotations

from typing import Any

from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue import keys
from shared.queue.claims import Append, ClaimedJob, Claims, Demand, Reaper, WriteResult
from shared.queue.redis import Redis

MODEL = "m"
MUCH = 1_000_000
"""Tokens that a worker has memory for, where memory is not what a test is about."""
SUCCESS = Ending(Status.SUCCEEDED, finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def submission(
    owner: str = "a", model: str = MODEL, *, prompt: str = "hi", max_tokens: int = 10, **more: Any
) -> Submission:
    """A job about to be accepted."""
    return Submission(Request(model, max_tokens, Sampling(0.0), prompt=prompt), owner, **more)


def submit(jobs: Jobs, owner: str = "a", **more: Any) -> Job:
    """Accept a job."""
    return jobs.create(submission(owner, **more)).job


def lease(client: Redis, name: str) -> Claims:
    """A worker with a lease."""
    claims = Claims(client, name)
    claims.renew(60)
    return claims


def reserved(worker: Claims, rows: int = 1, *, model: str = MODEL, **more: Any) -> list[ClaimedJob]:
    """What a worker reserves when it has room for so many rows."""
    return [*worker.claim(model, Demand(**{"rows": rows, "tokens": MUCH, **more})).jobs]


def taken(worker: Claims) -> ClaimedJob:
    """Reserve one job."""
    (claimed,) = reserved(worker)
    return claimed


def row(claimed: ClaimedJob, n: int = 0, text: str = "", *tokens: int, **more: Any) -> Append:
    """What a step gave for a job; `n` is the number of the event, by default the first after its admission."""
    job = claimed.job
    return Append(job.id, job.attempt, job.claimed_at, n or job.last_event + 2, text, tokens, **more)


def started(worker: Claims) -> ClaimedJob:
    """Reserve one job and admit it to the batch."""
    claimed = taken(worker)
    assert worker.append([row(claimed, start=True)]) == [WriteResult.OK]
    return claimed


def end(worker: Claims, claimed: ClaimedJob, ending: Ending = SUCCESS) -> None:
    """End a job that was admitted."""
    assert worker.append([row(claimed, ending=ending)]) == [WriteResult.OK]


def run(worker: Claims) -> ClaimedJob:
    """Reserve one job, admit it, end it."""
    claimed = started(worker)
    end(worker, claimed)
    return claimed


def held(claimed: ClaimedJob) -> tuple[str, str]:
    """A claim as `Claims.release` takes it."""
    return claimed.job.id, claimed.job.claimed_at


def lapse(client: Redis, worker: str) -> None:
    """The worker's lease runs out now."""
    client.zadd(keys.LEASES, {worker: 1.0})


def over(client: Redis, job: Job, seconds: float) -> None:
    """Move a job this many seconds into the past; its place in the queue stays."""
    for name in ("created_at", "end_by"):
        moment = float(client.hget(keys.JOB + job.id, name))
        client.hset(keys.JOB + job.id, name, f"{moment - seconds:.6f}")
    client.zincrby(keys.TIMERS, -seconds, job.id)


def kinds(client: Redis, job: Job) -> list[str]:
    """The kinds of the events in a job's log."""
    return [str(event.kind) for event in JobLog(client).read(job.id)]


def make_reaper(client: Redis, max_deaths: int = 3, failed_request_bytes: int = 2**20) -> Reaper:
    """A reaper with the usual bounds."""
    return Reaper(client, max_deaths, failed_request_bytes)


def reap(client: Redis, max_deaths: int = 3) -> list[str]:
    """One pass of the reaper."""
    return make_reaper(client, max_deaths).reap()
