"""Samples of the service's state: queues, latencies and ended jobs between two samples, and the last hour."""

from __future__ import annotations

import pytest

from shared.histogram import Histogram
from shared.jobs.record import Priority
from shared.jobs.store import Jobs
from shared.models.registry import Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.fake_redis import FakeRedis
from tests.support.queueing import MODEL, lease, run, submit
from web.cluster.samples import KEPT, Sample, Samples


@pytest.fixture
def client() -> Redis:
    return FakeRedis()


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    Registry(client).mark_servable([MODEL])
    return Jobs(client, Settings(durable=False))


def announce(client: Redis, worker: str, *histograms: Histogram) -> None:
    stats = {"tokens_per_s": 7.0, "memory_active_bytes": 100.0}
    info = WorkerInfo(worker, "n", "h", 1, MODEL, "ready", 4, 2, 1.0, 2.0, stats, {}, 1, histograms)
    Registry(client).announce_worker(info, 60)


def histogram(name: str, *values: float) -> Histogram:
    made = Histogram(name, (1.0, 2.0, 4.0), "normal")
    for value in values:
        made.observe(value)
    return made


def test_a_sample_has_the_queues_and_the_workers(client: Redis, jobs: Jobs) -> None:
    for priority in (Priority.BATCH, Priority.BATCH, Priority.HIGH):
        submit(jobs, priority=priority)
    announce(client, "n/1")
    announce(client, "n/2")
    sample = Samples(client).take()
    assert sample.waiting == {"batch": 2, "high": 1}
    assert (sample.running, sample.slots, sample.tokens_per_s) == (4, 8, 14.0)
    assert sample.memory_bytes == 100  # both models are in one process
    assert (sample.ended, sample.ttft, sample.itl) == ({}, None, None)


def test_jobs_and_latencies_are_those_since_the_sample_before(client: Redis, jobs: Jobs) -> None:
    samples, worker = Samples(client), lease(client, "w1")
    announce(client, "n/1", histogram("time_to_first_token", 0.5, 0.5, 0.5))
    samples.take()
    submit(jobs)
    run(worker)
    jobs.stop(submit(jobs).id, "a")
    announce(client, "n/1", histogram("time_to_first_token", 0.5, 0.5, 0.5, 3.0), histogram("inter_token_latency", 9.0))
    announce(client, "n/2", histogram("time_to_first_token", 3.0))
    sample = samples.take()
    assert sample.ended == {"succeeded": 1, "cancelled": 1}
    assert sample.ttft is not None and 2.0 < sample.ttft.p50 <= sample.ttft.p99 <= 4.0
    assert sample.itl is not None and sample.itl.p99 == 4.0
    assert samples.take().ttft is None
    assert [each.ended for each in samples.recent()] == [{}, sample.ended, {}]


def test_only_the_last_hour_is_kept(client: Redis) -> None:
    samples = Samples(client)
    client.rpush(keys.SAMPLES, Sample(at=1.0).to_json())
    for _ in range(KEPT - 1):
        samples.take()
    assert len(samples.recent()) == KEPT - 1
    for _ in range(3):
        samples.take()
    assert client.llen(keys.SAMPLES) == KEPT
