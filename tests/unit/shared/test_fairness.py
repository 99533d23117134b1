"""Who is served next: turns of API keys by weight, classes, and limits of running jobs."""

from __future__ import annotations

from collections import Counter

import pytest

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from shared.jobs.store import Jobs, new_job_id
from shared.models.registry import Registry
from shared.queue.claims import ClaimedJob, Claims
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, end, lapse, lease, reap, reserved, row, run, started, submission, submit

ONE = OwnerLimits(max_running=1)


@pytest.fixture
def client(valkey_client: Redis) -> Redis:
    return valkey_client


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(
        client,
        Settings(
            durable=False, max_queue=100_000, max_queue_per_key=100_000, queue_bytes_per_key=2**40, queue_bytes=2**40
        ),
    )


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w")


def submit_many(jobs: Jobs, count: int, owner: str = "a", **options: object) -> None:
    for _ in range(count // 500 or 1):
        some = [submission(owner, **options) for _ in range(min(500, count))]
        jobs.create_all(some, [new_job_id() for _ in some])


def owners(worker: Claims, count: int) -> str:
    return "".join(run(worker).job.owner for _ in range(count))


def test_ten_thousand_jobs_delay_one_of_another_key_by_one_job(jobs: Jobs, worker: Claims) -> None:
    submit_many(jobs, 10_000)
    assert owners(worker, 3) == "aaa"
    submit(jobs, "b")
    assert "b" in owners(worker, 2)


def test_keys_are_served_by_weight(jobs: Jobs, worker: Claims) -> None:
    for owner, weight in (("a", 1.0), ("b", 3.0), ("c", 0.5)):
        submit_many(jobs, 60, owner, limits=OwnerLimits(weight=weight))
    assert Counter(owners(worker, 45)) == pytest.approx({"a": 10, "b": 30, "c": 5}, abs=1)


def test_a_new_key_does_not_catch_up(jobs: Jobs, worker: Claims) -> None:
    submit_many(jobs, 40, "a", limits=OwnerLimits(weight=10))
    owners(worker, 20)
    submit_many(jobs, 40, "b", limits=OwnerLimits(weight=10))
    assert Counter(owners(worker, 20)) == pytest.approx({"a": 10, "b": 10}, abs=1)


@pytest.mark.parametrize("rows", [1, 4])
def test_no_class_starves(jobs: Jobs, worker: Claims, rows: int) -> None:
    for priority in Priority:
        submit_many(jobs, 80, priority=priority)
    served: list[Priority] = []
    while len(served) < 40:
        for claimed in reserved(worker, rows):
            worker.append([row(claimed, start=True)])
            end(worker, claimed)
            served.append(claimed.job.priority)
    counts = Counter(served[:40])
    assert counts[Priority.NORMAL] == pytest.approx(4, abs=1) and counts[Priority.BATCH] == pytest.approx(4, abs=1)


def test_batch_jobs_run_although_others_take_every_row(jobs: Jobs, worker: Claims) -> None:
    submit_many(jobs, 100)
    submit_many(jobs, 3, priority=Priority.BATCH)
    served: list[ClaimedJob] = []
    for _ in range(15):  # a full worker claims only spare jobs
        served += reserved(worker, 0, spare=1, reserve=2)
    batch = [claimed.rank for claimed in served if claimed.job.priority is Priority.BATCH]
    assert batch == [-1.0]  # it is admitted before the other spare jobs


def test_running_jobs_are_limited_and_further_ones_wait(client: Redis, jobs: Jobs, worker: Claims) -> None:
    first = [jobs.create(submission("a", limits=ONE)).job for _ in range(3)]
    submit(jobs, "b")
    claimed = reserved(worker, 8)
    assert [each.job.owner for each in claimed] == ["a", "b"]
    assert Registry(client).waiting(MODEL) == 4  # reserved ones included
    assert [jobs.position(job) for job in first] == [1, 2, 3]
    for each in claimed:
        worker.append([row(each, start=True)])
    assert reserved(worker, 8) == []
    assert [jobs.position(jobs.get(job.id, "a")) for job in first] == [None, 1, 2]
    end(worker, claimed[0])
    assert [each.job.id for each in reserved(worker, 8)] == [first[1].id]


def test_waiting_jobs_of_a_limited_key_keep_their_order(jobs: Jobs, worker: Claims) -> None:
    ids = [jobs.create(submission("a", limits=ONE)).job.id for _ in range(2)]
    claimed = started(worker)
    assert reserved(worker, 8) == []
    ids.append(jobs.create(submission("a", limits=ONE)).job.id)  # must not overtake the parked one
    order = [claimed.job.id]
    for _ in range(2):
        end(worker, claimed)
        claimed = started(worker)
        order.append(claimed.job.id)
    assert order == ids


def test_limited_key_with_thousands_of_jobs_does_not_hide_those_of_others(jobs: Jobs, worker: Claims) -> None:
    submit_many(jobs, 2000, "a", limits=ONE)
    submit_many(jobs, 600, "b")
    blocker = started(worker)
    assert blocker.job.owner == "a"
    assert owners(worker, 500) == "b" * 500


def test_limit_counts_all_models_and_workers(client: Redis, jobs: Jobs) -> None:
    one, two = lease(client, "one"), lease(client, "two")
    jobs.create(submission("a", MODEL, limits=ONE))
    jobs.create(submission("a", "other", limits=ONE))
    assert len(reserved(one)) == 1
    assert reserved(two, model="other") == []
    lapse(client, "one")
    reap(client)  # the job returns to the queue, and the other one is free
    assert len(reserved(two, model="other")) == 1


def test_parked_jobs_are_cancelled_expired_and_counted_like_others(client: Redis, jobs: Jobs, worker: Claims) -> None:
    parked = [jobs.create(submission("a", limits=ONE)).job for _ in range(4)][1:]
    running = started(worker)
    assert reserved(worker, 8) == []
    assert client.hget(keys.PARKED_COUNTS, f"{MODEL} a") == "3"
    jobs.stop(parked[0].id, "a")
    client.zadd(keys.TIMERS, {parked[1].id: 1.0})
    reap(client)
    assert [jobs.get(job.id, "a").status.value for job in parked] == ["cancelled", "expired", "queued"]
    assert client.hget(keys.QUEUED + MODEL, "a") == "1"
    end(worker, running)
    assert run(worker).job.id == parked[2].id
    assert not client.exists(keys.PARKED_COUNTS, keys.QUEUED + MODEL, keys.TURNS + MODEL)
    assert client.keys(keys.PARKED + "*") == []


def test_parked_jobs_return_when_the_limit_is_lifted_or_no_worker_is_left(
    client: Redis, jobs: Jobs, worker: Claims
) -> None:
    for _ in range(3):
        jobs.create(submission("a", limits=ONE))
    started(worker)
    assert reserved(worker, 8) == []
    lapse(client, "w")
    assert reap(client) == [MODEL]
    assert client.zcard(keys.QUEUE + MODEL) == 1  # the job of the lost worker; the others wait for it
    worker.renew(60)
    jobs.create(submission("a", limits=OwnerLimits(max_running=0)))
    assert len(reserved(worker, 8)) == 4
