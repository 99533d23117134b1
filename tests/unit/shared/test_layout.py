"""Jobs of the first layout are converted in every state, while old and new processes run side by side."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.errors import JobFailure
from shared.jobs.images import ImageStore
from shared.jobs.log import JobLog
from shared.jobs.record import Parsing, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import DELETED_S, Jobs
from shared.queue.claims import Claims, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import (
    MODEL,
    end,
    held,
    lapse,
    lease,
    make_reaper,
    reap,
    reserved,
    row,
    run,
    started,
    submit,
    taken,
)

RETENTION_S = 500


class OldProcesses:
    """Writes what processes of the first layout write: one hash per job, and a separate queue."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.turn = 0

    def submit(self, job_id: str, owner: str = "a", job_class: int = 1, **request: Any) -> str:
        converted = Request(**{"model": MODEL, "max_tokens": 9, "sampling": Sampling(0.0), "prompt": "hi"} | request)
        generation = {name: value for name, value in json.loads(converted.to_json()).items() if name != "logprobs"}
        now = self.client.time()[0]
        record = {
            "id": job_id, "owner": owner, "model": MODEL, "class": job_class, "status": "queued", "attempt": 0,
            "losses": 0, "retention_s": RETENTION_S, "idempotency_key": "", "fingerprint": "", "created_at": now,
            "end_by": now + 900, "generation": json.dumps(generation), "metadata": "{}", "request_id": "r",
            "marks": "1" * 16, "seq": 0,
        }  # fmt: skip
        self.client.hset(keys.JOB + job_id, mapping=record)
        self.turn += 1
        self.wait(job_id, job_class * 10**12 + self.turn)
        self.client.zadd(keys.OWNER + owner, {job_id: now})
        self.client.zadd(keys.TIMERS, {job_id: now + 300})
        self.emit(job_id, "queued", {"reason": "accepted"})
        return job_id

    def wait(self, job_id: str, score: float) -> None:
        self.client.hset(keys.JOB + job_id, "status", "queued")
        self.client.zadd(keys.OLD_QUEUE + MODEL, {job_id: score})

    def run(self, job_id: str, worker: str = "old", *chunks: str) -> str:
        attempt = self.client.hincrby(keys.JOB + job_id, "attempt", 1)
        self.client.zrem(keys.OLD_QUEUE + MODEL, job_id)
        now = self.client.time()[0]
        times = {"claimed_at": now, "started_at": now}
        self.client.hset(keys.JOB + job_id, mapping={"status": "running", "worker": worker, **times})
        self.client.sadd(keys.RUNNING + worker, job_id)
        self.emit(job_id, "started", {"attempt": attempt})
        for text in chunks:
            self.emit(job_id, "chunk", {"text": text}, "7")
        return job_id

    def end(self, job_id: str, status: Status = Status.SUCCEEDED, **fields: Any) -> str:
        worker = self.client.hget(keys.JOB + job_id, "worker") or ""
        now = self.client.time()[0]
        self.client.hset(keys.JOB + job_id, mapping={"status": status, "worker": "", "finished_at": now, **fields})
        self.client.srem(keys.RUNNING + worker, job_id)
        self.client.zrem(keys.TIMERS, job_id)
        self.emit(job_id, "done", {"status": status})
        self.client.expire(keys.JOB + job_id, RETENTION_S)
        self.client.expire(keys.LOG + job_id, RETENTION_S)
        return job_id

    def emit(self, job_id: str, event: str, data: dict[str, Any], tokens: str = "") -> None:
        n = self.client.hincrby(keys.JOB + job_id, "seq", 1)
        entry = {"e": event, "d": json.dumps(data), **({"t": tokens} if tokens else {})}
        self.client.xadd(keys.LOG + job_id, entry, id=f"{n}-0")


@pytest.fixture
def old(client: Redis) -> OldProcesses:
    return OldProcesses(client)


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def test_worker_drops_a_reserved_job_that_an_old_process_ended(client: Redis, jobs: Jobs) -> None:
    worker = lease(client, "w1")
    submit(jobs)
    claimed = taken(worker)
    client.hset(keys.JOB + claimed.job.id, mapping={"status": "expired", "finished_at": "1"})
    assert worker.append([row(claimed, start=True)]) == [WriteResult.FENCED]
    assert worker.release([held(claimed)]) == []
    assert worker.renew(60).reserved == ()


def test_queued_jobs_keep_their_order(client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    submitted = [old.submit(f"job_{n}", owner) for n, owner in enumerate("aab")]
    urgent = old.submit("job_urgent", job_class=0)
    assert jobs.adopt_old_layout() == 0
    assert not client.exists(keys.OLD_QUEUE + MODEL)
    assert [jobs.position(jobs.get(urgent, "a")), jobs.position(jobs.get(submitted[2], "b"))] == [1, 4]
    claimed = run(worker)
    assert (claimed.job.id, claimed.request.prompt, claimed.tokens) == (urgent, "hi", None)
    assert [run(worker).job.id for _ in submitted] == submitted
    assert jobs.get(submitted[0], "a").status is Status.SUCCEEDED
    assert client.hgetall(keys.BYTES) == {}


def test_fair_queueing_includes_converted_jobs(old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    for n in range(3):
        old.submit(f"job_{n}", "a")
    jobs.adopt_old_layout()
    late, other = submit(jobs, "a"), submit(jobs, "b")
    order = [run(worker).job.id for _ in range(5)]
    assert order.index(other.id) < order.index(late.id) == 4


def test_claim_converts_jobs_that_old_api_processes_queue(old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    job_id = old.submit("job_1")
    assert run(worker).job.id == job_id
    assert jobs.adopt_old_layout() == 0


def test_converting_twice_changes_nothing(client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    old.submit("job_1")
    old.end(old.run(old.submit("job_2")), text="done")
    jobs.adopt_old_layout()
    before = {key: client.dump(key) for key in client.keys("*")}
    old.wait("job_1", 10**12 + 1)  # as if the search and a claim converted the job at the same time
    assert jobs.adopt_old_layout() == 0
    reserved(worker, 0, spare=1)
    assert client.hgetall(keys.BYTES)["total"] == client.hget(keys.JOB + "job_1", "bytes")
    assert client.zcard(keys.QUEUE + MODEL) == 1 and not client.exists(keys.OLD_QUEUE + MODEL)
    assert all(client.dump(key) == value for key, value in before.items() if "job_2" in key)


def test_job_that_an_old_worker_runs_is_not_converted(client: Redis, old: OldProcesses, jobs: Jobs) -> None:
    lease(client, "old")
    job_id = old.run(old.submit("job_1"), "old", "one ", "two")
    record = client.hgetall(keys.JOB + job_id)
    assert jobs.adopt_old_layout() == 1
    assert client.hgetall(keys.JOB + job_id) == record
    old.end(job_id, text="one two", completion_tokens=2)
    assert jobs.adopt_old_layout() == 0
    ended = jobs.get(job_id, "a")
    assert (ended.status, jobs.text(ended)) == (Status.SUCCEEDED, "one two")


def test_job_that_an_old_worker_hands_back_is_resumed(old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    job_id = old.run(old.submit("job_1"), "old", "one ")
    old.wait(job_id, 10**12)
    claimed = started(worker)
    assert (claimed.job.id, claimed.job.attempt, claimed.job.started_at is not None) == (job_id, 2, True)
    worker.append([row(claimed, claimed.job.last_event + 2, "two", 8)])
    assert jobs.text(jobs.get(job_id, "a")) == "one two"


@pytest.mark.parametrize("in_record", [True, False])
def test_ended_job_keeps_its_text(client: Redis, old: OldProcesses, jobs: Jobs, in_record: bool) -> None:
    fields = {"text": "one two"} if in_record else {}  # a cancelled job has its text only in the log
    job_id = old.end(old.run(old.submit("job_1"), "old", "one ", "two"), Status.CANCELLED, **fields)
    assert jobs.adopt_old_layout() == 0
    job = jobs.get(job_id, "a")
    assert (job.status, jobs.text(job)) == (Status.CANCELLED, "one two")
    assert 0 < client.ttl(keys.OUTPUT + job_id) <= RETENTION_S
    assert not client.exists(keys.REQUEST + job_id)
    jobs.forget(job_id, "a")
    assert all(0 < client.ttl(key) <= DELETED_S for key in client.keys("*") if job_id in key)


def test_request_of_a_failed_job_is_kept_within_the_limit(client: Redis, old: OldProcesses, jobs: Jobs) -> None:
    job_id = old.end(old.run(old.submit("job_1")), Status.FAILED, error_code=JobFailure.ENGINE)
    jobs.adopt_old_layout()
    assert 0 < client.ttl(keys.REQUEST + job_id) <= RETENTION_S
    make_reaper(client, failed_request_bytes=0).reap()
    old.end(old.run(old.submit("job_2")), Status.FAILED, error_code=JobFailure.ENGINE)
    client.hset(keys.BYTES, "failed_limit", 0)
    jobs.adopt_old_layout()
    assert not client.keys(keys.REQUEST + "*") and not client.exists(keys.FAILED)


def test_request_keeps_images_and_parsing(client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    def image(name: str, width: int) -> dict[str, Any]:
        return {"type": "image", "image": name, "width": width, "height": 48}

    content = [image("a" * 64, 64), {"type": "text", "text": "What?"}, image("b" * 64, 96)]
    parsed = {"prompt": None, "messages": ({"role": "user", "content": content},), "parse": "ui_tars"}
    plain = {"prompt": None, "messages": ({"role": "user", "content": "hello"},)}
    ImageStore(client).put("job_1", {"a" * 64: b"A"})
    old.submit("job_1", **parsed)
    old.submit("job_2", **plain)
    jobs.adopt_old_layout()
    assert jobs.get("job_1", "a").parsing == Parsing("ui_tars", (96, 48))
    assert jobs.get("job_2", "a").parsing is None
    first, second = reserved(worker, 2)
    assert [part["width"] for part in first.request.image_parts] == [64, 96]
    assert second.request.messages == plain["messages"]
    assert client.exists(keys.IMAGES + "job_1")


def test_unconverted_jobs_can_be_cancelled_and_expire(
    client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims
) -> None:
    cancelled, late = old.submit("job_1"), old.submit("job_2")
    jobs.stop(cancelled, "a")
    client.zadd(keys.TIMERS, {late: 1.0})
    reap(client)
    assert reserved(worker) == []
    assert [jobs.get(job_id, "a").status for job_id in (cancelled, late)] == [Status.CANCELLED, Status.EXPIRED]
    assert jobs.adopt_old_layout() == 0
    assert client.hgetall(keys.BYTES).keys() <= {"failed_limit"} and not client.exists(keys.OLD_QUEUE + MODEL)
    assert not client.keys(keys.REQUEST + "*")


def test_every_key_of_a_converted_job_expires(client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    old.submit("job_1")
    old.end(old.run(old.submit("job_2"), "old", "text"), text="text")
    jobs.adopt_old_layout()
    end(worker, started(worker))
    permanent = [key for key in client.keys("*") if client.ttl(key) == -1 and "job_" in key]
    assert permanent == []


def test_job_of_a_crashed_old_worker_is_recovered(client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims) -> None:
    lease(client, "old")
    job_id = old.run(old.submit("job_1"), "old", "one ")
    lapse(client, "old")
    assert reap(client) == [MODEL]
    claimed = started(worker)
    assert (claimed.job.id, claimed.job.attempt, claimed.request.prompt) == (job_id, 2, "hi")
    worker.append([row(claimed, claimed.job.last_event + 2, "two", 8)])
    end_number = claimed.job.last_event + 3
    assert worker.append([row(claimed, end_number, ending=None)]) == [WriteResult.OK]
    end(worker, claimed)
    ended = jobs.get(job_id, "a")
    assert (ended.status, jobs.text(ended)) == (Status.SUCCEEDED, "one two")
    assert JobLog(client).written(job_id).tokens == (7, 8)
    assert client.hgetall(keys.BYTES) == {"failed_limit": str(2**20)}


def test_job_that_an_old_reaper_takes_from_a_new_worker_is_recovered(
    client: Redis, old: OldProcesses, jobs: Jobs, worker: Claims
) -> None:
    job = submit(jobs)
    started(worker)
    client.srem(keys.RUNNING + "w1", job.id)
    client.zrem(keys.LEASES, "w1")
    client.hset(keys.JOB + job.id, mapping={"worker": "", "losses": 1})
    old.wait(job.id, 10**12)
    other = lease(client, "w2")
    again = taken(other)
    assert (again.job.id, again.job.attempt) == (job.id, 2)
    assert not client.exists(keys.OLD_QUEUE + MODEL)


def test_job_that_an_old_process_ends_leaves_no_keys(client: Redis, old: OldProcesses, jobs: Jobs) -> None:
    job = submit(jobs)
    old.end(job.id, Status.CANCELLED)
    assert reserved(lease(client, "w1")) == []
    assert client.hgetall(keys.BYTES) == {}
    assert not client.exists(keys.QUEUE + MODEL, keys.REQUEST + job.id)
