"""Owners' access to their jobs, and how long ended jobs are kept."""

from __future__ import annotations

import pytest

from shared.errors import Conflict, Gone, NotFound
from shared.jobs.log import JobLog
from shared.jobs.record import Status
from shared.jobs.store import DELETED_S, Jobs
from shared.queue.claims import Claims
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import (
    end,
    lease,
    row,
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


def test_another_owner_sees_no_job(jobs: Jobs) -> None:
    job = submit(jobs)
    for call in (jobs.get, jobs.stop, jobs.forget):
        with pytest.raises(NotFound):
            call(job.id, "b")
    assert jobs.get(job.id, "a").status is Status.QUEUED


def test_only_an_ended_job_can_be_deleted(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, idempotency_key="k")
    for advance in (lambda: None, lambda: taken(worker)):
        advance()
        with pytest.raises(Conflict):
            jobs.forget(job.id, "a")
    jobs.stop(job.id, "a")
    jobs.forget(job.id, "a")
    assert not client.keys("*idem*")
    names = client.keys(f"*{job.id}*")
    assert names and all(0 < client.ttl(name) <= DELETED_S for name in names)
    assert jobs.latest(job).status is Status.CANCELLED  # for requests that were waiting for it
    for call in (jobs.get, jobs.stop, jobs.forget):
        with pytest.raises(NotFound):
            call(job.id, "a")
    assert jobs.recent("a", limit=5) == []
    client.delete(*names)
    with pytest.raises(NotFound):
        jobs.latest(job)


@pytest.mark.parametrize("missing", [1, 3, 4, 5])
def test_gap_in_a_log_is_an_error(client: Redis, jobs: Jobs, worker: Claims, missing: int) -> None:
    job = submit(jobs)
    claimed = started(worker)
    worker.append([row(claimed, n, str(n), n) for n in (3, 4, 5)])
    log = JobLog(client)
    assert log.written(job.id, 5).text == "345"
    client.xdel(keys.LOG + job.id, f"{missing}-0")
    with pytest.raises(Gone, match=f"event {missing} "):
        log.written(job.id, 5)
    assert [event.n for event in log.read(job.id, after=missing)] == list(range(missing + 1, 6))
    assert jobs.text(jobs.get(job.id, "a")) == "345", "the text is stored separately"
    client.delete(keys.LOG + job.id)
    with pytest.raises(Gone):
        log.written(job.id, 5)


def test_ended_is_read_from_the_record_not_from_the_log(client: Redis, jobs: Jobs) -> None:
    job, log = submit(jobs), JobLog(client)
    client.delete(keys.LOG + job.id)
    assert not log.ended(job.id)
    jobs.stop(job.id, "a")
    client.delete(keys.LOG + job.id)
    assert log.ended(job.id)
    jobs.forget(job.id, "a")
    assert log.ended(job.id)


@pytest.mark.parametrize(("minimum", "kept_s"), [(0, 77), (50, 77), (300, 300)])
def test_a_job_may_be_kept_for_longer(client: Redis, minimum: int, kept_s: int) -> None:
    jobs = Jobs(client, Settings(retention_s=77, durable=False))
    job = submit(jobs, idempotency_key="k", min_retention_s=minimum)
    jobs.stop(job.id, "a")
    kept = {name: client.ttl(name) for name in (keys.JOB + job.id, keys.LOG + job.id, keys.IDEM + "a:k")}
    assert all(kept_s - 5 <= ttl <= kept_s for ttl in kept.values()), kept


@pytest.mark.parametrize(("log_retention_s", "log_ttl_s"), [(None, 77), (33, 33)])
def test_ended_job_lives_as_long_as_its_retention(
    client: Redis, worker: Claims, log_retention_s: int | None, log_ttl_s: int
) -> None:
    jobs = Jobs(client, Settings(retention_s=77, log_retention_s=log_retention_s, durable=False))
    job = submit(jobs, idempotency_key="k")
    claimed = started(worker)
    worker.append([row(claimed, 3, "x", 1)])
    own = [keys.JOB + job.id, keys.OUTPUT + job.id, f"{keys.IDEM}a:k"]
    assert {client.ttl(key) for key in (*own, keys.LOG + job.id)} == {-1}
    end(worker, claimed)
    assert {client.ttl(key) for key in own} == {77}
    assert client.ttl(keys.LOG + job.id) == log_ttl_s


def test_long_list_of_expired_jobs_is_cleared(client: Redis, jobs: Jobs) -> None:
    client.zadd(keys.OWNER + "a", {f"job_{n}": n for n in range(1100)})
    assert jobs.recent("a", limit=1) == []
    assert client.zcard(keys.OWNER + "a") == 0


def test_list_that_is_never_read_does_not_grow(client: Redis, jobs: Jobs) -> None:
    client.zadd(keys.OWNER + "a", {f"job_{n}": n for n in range(10)})
    submitted = {submit(jobs).id for _ in range(6)}
    assert set(client.zrange(keys.OWNER + "a", 0, -1)) == submitted


def test_list_is_sorted_newest_first_and_has_pages(jobs: Jobs) -> None:
    submitted = [submit(jobs) for _ in range(5)]
    page = jobs.recent("a", limit=2)
    rest = jobs.recent("a", limit=9, before=page[-1].created_at)
    assert [job.id for job in page + rest] == [job.id for job in reversed(submitted)]
