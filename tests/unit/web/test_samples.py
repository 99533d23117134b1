"""Samples of the service's state: queues, latencies of ended jobs, and the last hour."""

from __future__ import annotations

import pytest

from shared.jobs.record import Ending, Priority, Status
from shared.jobs.store import Jobs
from shared.models.registry import Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.queueing import MODEL, end, lease, started, submit
from web.cluster.queues import depths
from web.cluster.samples import KEPT, Percentiles, Sample, Samples


@pytest.fixture
def client() -> Redis:
    return FakeRedis()


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    Registry(client).mark_servable([MODEL])
    return Jobs(client, Settings(durable=False))


def test_depths_are_by_class_with_the_age_of_the_oldest_job(client: Redis, jobs: Jobs) -> None:
    first = submit(jobs, priority=Priority.BATCH)
    submit(jobs, "b", priority=Priority.BATCH)
    high = submit(jobs, priority=Priority.HIGH)
    found = {(each.model, each.priority): each for each in depths(client, [MODEL, "empty"])}
    assert {key: each.waiting for key, each in found.items()} == {(MODEL, Priority.BATCH): 2, (MODEL, Priority.HIGH): 1}
    assert found[MODEL, Priority.BATCH].oldest_at == pytest.approx(first.created_at, abs=1)
    assert found[MODEL, Priority.HIGH].oldest_at == pytest.approx(high.created_at, abs=1)


def test_each_ended_job_is_in_one_sample(client: Redis, jobs: Jobs) -> None:
    worker, samples = lease(client, "w1"), Samples(client)
    for first_s, total_s in ((0.5, 1.5), (1.0, 3.0)):
        submit(jobs)
        timings = {"first_token_s": first_s, "total_s": total_s}
        end(worker, started(worker), Ending(Status.SUCCEEDED, completion_tokens=11, timings=timings))
    jobs.stop(submit(jobs).id, "a")
    waiting = submit(jobs, priority=Priority.BATCH)
    info = WorkerInfo("w1", "n", "h", 1, MODEL, "ready", 4, 2, 1.0, 2.0, {"tokens_per_s": 7.0}, {})
    Registry(client).announce_worker(info, 60)
    sample = samples.take()
    assert sample.ended == {"succeeded": 2, "cancelled": 1}
    assert sample.ttft == Percentiles(0.5, 1.0) and sample.itl == Percentiles(0.1, 0.2)
    assert (sample.waiting, sample.running, sample.slots, sample.tokens_per_s) == ({"batch": 1}, 2, 4, 7.0)
    jobs.stop(waiting.id, "a")
    assert samples.take().ended == {"cancelled": 1}
    assert [each.ended for each in samples.recent()] == [sample.ended, {"cancelled": 1}]


def test_only_the_last_hour_is_kept(client: Redis) -> None:
    samples = Samples(client)
    client.rpush(keys.SAMPLES, Sample(at=1.0).to_json())
    for _ in range(KEPT - 1):
        samples.take()
    assert len(samples.recent()) == KEPT - 1
    for _ in range(3):
        samples.take()
    assert client.llen(keys.SAMPLES) == KEPT
