"""Jobs that stop early: cancelled, not started in time, or past their deadline."""

from __future__ import annotations

import pytest

from shared.errors import Conflict, Expiry
from shared.jobs.record import Ending, Status
from shared.jobs.store import Jobs
from shared.queue.claims import Claims, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import (
    MODEL,
    age,
    held,
    kinds,
    lapse,
    lease,
    reap,
    reserved,
    row,
    run,
    started,
    submit,
    taken,
)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(max_queue=50, max_queue_per_key=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def test_queued_job_is_cancelled_at_once(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    assert jobs.stop(job.id, "a").status is Status.CANCELLED
    assert reserved(worker) == []
    assert jobs.stop(job.id, "a").status is Status.CANCELLED, "cancelling again is not an error"
    assert kinds(client, job) == ["queued", "done"]


def test_running_job_is_cancelled_by_its_worker(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    claimed = started(worker)
    assert jobs.stop(job.id, "a").status is Status.RUNNING
    assert worker.append([row(claimed, 3, "he", 1)]) == [WriteResult.CANCELLED]
    assert [each.stop_as for each in worker.renew(60).running] == [WriteResult.CANCELLED]
    worker.append([row(claimed, 4, ending=Ending(Status.CANCELLED))])
    ended = jobs.get(job.id, "a")
    assert (ended.status, jobs.text(ended)) == (Status.CANCELLED, "he")


def test_ended_job_cannot_be_cancelled(jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    run(worker)
    with pytest.raises(Conflict):
        jobs.stop(job.id, "a")


@pytest.mark.parametrize("how", ["lost", "handed back"])
def test_cancelled_job_is_not_resumed(client: Redis, jobs: Jobs, worker: Claims, how: str) -> None:
    job = submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, 3, "hé", 1, 2)])
    jobs.stop(job.id, "a")
    if how == "lost":
        lapse(client, "w1")
        assert reap(client, max_deaths=1) == []
    else:
        assert worker.release([held(claimed)]) == []
    ended = jobs.get(job.id, "a")
    assert (ended.status, jobs.text(ended), ended.completion_tokens) == (Status.CANCELLED, "hé", 2)


@pytest.mark.parametrize(
    ("limits", "limit"),
    [
        ({"start_within_s": 5}, "5 s (start_within_s)"),
        ({"start_within_s": 0.25, "deadline_s": 600}, "0.25 s (start_within_s)"),
        ({"start_within_s": 600, "deadline_s": 100}, "100 s (deadline_s)"),
    ],
)
@pytest.mark.parametrize("by", ["reaper", "claim"])
def test_job_that_does_not_start_in_time_expires(
    client: Redis, jobs: Jobs, worker: Claims, limits: dict[str, float], limit: str, by: str
) -> None:
    job = submit(jobs, **limits)
    following = submit(jobs)
    age(client, job, 200)
    if by == "reaper":
        assert reap(client) == []
    assert taken(worker).job.id == following.id, "a late job never starts, even without a reaper"
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code, ended.started_at) == (Status.EXPIRED, Expiry.START, None)
    assert ended.error_message == f"The job did not start within {limit}."
    assert (jobs.text(ended), ended.history) == ("", ())


def test_running_job_stops_at_its_deadline(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, start_within_s=5, deadline_s=90)
    claimed = started(worker)
    age(client, job, 60)
    reap(client)
    assert worker.append([row(claimed, 3, "he", 1)]) == [WriteResult.OK], "start_within_s no longer counts"
    age(client, job, 60)
    reap(client)
    assert worker.append([row(claimed, 4, "l", 2)]) == [WriteResult.EXPIRED]
    worker.append([row(claimed, 5, ending=Ending(Status.EXPIRED, completion_tokens=2))])
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert ended.error_message == "The job did not end within 90 s (deadline_s)."
    assert (jobs.text(ended), ended.completion_tokens) == ("hel", 2)


@pytest.mark.parametrize("by", ["reaper", "claim"])
def test_only_the_deadline_counts_after_the_first_start(client: Redis, jobs: Jobs, worker: Claims, by: str) -> None:
    job = submit(jobs, start_within_s=5, deadline_s=90)
    claimed = started(worker)
    worker.append([row(claimed, 3, "né🙂\n", 1, 2, 3), row(claimed, 4, "!", 4)])
    worker.release([held(claimed)])
    age(client, job, 60)
    reap(client)
    assert jobs.get(job.id, "a").status is Status.QUEUED
    age(client, job, 60)
    if by == "reaper":
        reap(client)
    assert reserved(worker) == []
    ended = jobs.get(job.id, "a")
    assert (ended.status, ended.error_code) == (Status.EXPIRED, Expiry.DEADLINE)
    assert (jobs.text(ended), ended.completion_tokens) == ("né🙂\n!", 4)


def test_admission_replaces_the_start_limit_by_the_deadline(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, start_within_s=100, deadline_s=1000)
    claimed = taken(worker)
    assert client.zscore(keys.TIMERS, job.id) == pytest.approx(job.created_at + 100, abs=1), "a reservation does not"
    worker.append([row(claimed, start=True)])
    assert client.zscore(keys.TIMERS, job.id) == pytest.approx(job.created_at + 1000, abs=1)


def test_claim_examines_a_limited_number_of_late_jobs(client: Redis, worker: Claims) -> None:
    jobs = Jobs(client, Settings(durable=False))
    late = [submit(jobs).id for _ in range(250)]
    client.zadd(keys.TIMERS, dict.fromkeys(late, 1.0))
    good = submit(jobs)
    assert reserved(worker) == []
    assert 1 < client.zcard(keys.QUEUE + MODEL) <= 51
    assert taken(worker).job.id == good.id
