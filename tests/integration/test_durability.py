"""A job that was accepted with 202 survives the SIGKILL of Redis; without a confirmation it is not accepted."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from redis import ConnectionError as RedisConnectionError
from redis import ReadOnlyError

from scripts.stack.ports import free_port
from shared.errors import NotDurable
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.redis.client import Redis, connect
from shared.redis.durability import ProvenScript, why_unproven
from shared.settings import Settings
from tests.plugins.stack import Stack
from tests.plugins.web_stack import StubWorker, WebStack, running_web
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from tests.support.load import Load
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually
from worker.runner.fake import FakeRunner

EVERYSEC = {**DURABLE, "appendfsync": "everysec"}
UNKNOWN_WAITAOF = {"rename-command": 'WAITAOF ""'}
"""Behaves like a Redis older than 7.2."""


def prompt(key: str) -> str:
    """Return a prompt that the fake backend answers slowly enough to be interrupted."""
    return f"!pause=0.01 {key}"


def jobs_of(redis: Redis) -> set[str]:
    return {name.removeprefix("mlxq:job:") for name in redis.scan_iter("mlxq:job:*", count=1000)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "redis",
    [pytest.param(DURABLE, id="always", marks=pytest.mark.long), pytest.param(EVERYSEC, id="everysec")],
)
def test_accepted_jobs_survive_a_killed_redis(redis: dict[str, str]) -> None:
    with running_web(redis) as web:
        load = Load(web.url, web.key, lambda key: {"prompt": key, "max_tokens": 1})
        with load.running(threads=8, each=60):
            for part in (0.25, 0.5, 0.75):
                eventually(lambda p=part: len(load.accepted) >= 480 * p + random.uniform(0, 40), within_s=60)
                web.kill_redis()
                before = set(load.accepted.values())
                web.start_redis()
                with web.client() as client:
                    assert before <= jobs_of(client)
        assert len(load.accepted) == 480
        assert load.refused <= {503}
        with web.client() as client:
            assert jobs_of(client) == set(load.accepted.values()), "a repeated submission creates no second job"


@pytest.mark.slow
def test_killed_redis_under_load_loses_no_job_and_runs_none_twice(
    fake_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)  # of the uninterrupted run in this process
    workers = [fake_stack.start_worker(LEASE_S="5", SLOTS="4") for _ in range(2)]
    load = Load(fake_stack.url, fake_stack.key, lambda key: {"prompt": prompt(key), "max_tokens": 20, "seed": 7})
    with load.running(threads=4, each=30):
        for part in (0.25, 0.5, 0.75):
            eventually(lambda p=part: len(load.accepted) >= 120 * p and fake_stack.slots_used(), within_s=60)
            fake_stack.valkey.terminate()
            fake_stack.valkey.start()
    log, runner = JobLog(fake_stack.redis), FakeRunner()
    with fake_stack.client() as client:
        for key, job_id in load.accepted.items():
            job = eventually(lambda i=job_id: (j := client.job(i, wait_s=10)).status.terminal and j, within_s=60)
            events = log.read(job_id)
            uninterrupted = run_alone(sequence_for(claimed(prompt(key), max_tokens=20, seed=7), runner), runner)
            assert (job.status, job.text) == (Status.SUCCEEDED, text_of(uninterrupted))
            assert "".join(event.text for event in events) == job.text
            assert [event.n for event in events] == list(range(1, len(events) + 1))
            kinds = [event.kind for event in events]
            assert (kinds.count(EventKind.STARTED), kinds.count(EventKind.DONE)) == (1, 1)
    assert jobs_of(fake_stack.redis) == set(load.accepted.values())
    logs = fake_stack.log("worker-0") + fake_stack.log("worker-1")
    assert [worker.poll() for worker in workers] == [None, None], logs


@pytest.mark.parametrize(
    ("redis", "reason"),
    [
        ({"appendonly": "no"}, "set appendonly yes"),
        ({**DURABLE, "appendfsync": "no"}, "appendfsync is no"),
        ({**EVERYSEC, **UNKNOWN_WAITAOF}, "use Redis 7.2 or later"),
        ({**DURABLE, **UNKNOWN_WAITAOF, "rename-command ": 'CONFIG ""'}, "use Redis 7.2 or later"),
    ],
    ids=["no append-only file", "no fsync", "old", "old and managed"],
)
def test_redis_that_cannot_confirm_durability_gets_no_jobs(redis: dict[str, str], reason: str) -> None:
    with running_web(redis) as web:
        with ready(web):
            view = web.http.get("/health").json()
            assert view["status"] == "degraded" and reason in view["reasons"][0]
        response = web.http.post("/v1/jobs", json={"prompt": "hi"})
        assert (response.status_code, response.json()["code"]) == (503, "not_durable")
        assert reason in response.json()["detail"] and response.headers["Retry-After"] == "10"
        with web.client() as client:
            assert jobs_of(client) == set()


@pytest.mark.parametrize(
    "redis", [DURABLE | UNKNOWN_WAITAOF, DURABLE | {"rename-command": 'CONFIG ""'}], ids=["old", "managed"]
)
def test_old_and_managed_redis_with_appendfsync_always_are_durable(redis: dict[str, str]) -> None:
    with running_web(redis) as web, ready(web):
        web.submit()
        assert not any("on disk" in reason for reason in web.http.get("/health").json()["reasons"])


def test_disabled_confirmation_is_reported() -> None:
    with running_web({"appendonly": "no"}, DURABLE="false") as web, ready(web):
        web.submit()
        view = web.http.get("/health").json()
        assert view["status"] == "degraded" and "DURABLE=false" in view["reasons"][0]


def test_missing_confirmation_is_a_503_and_a_retry_creates_one_job() -> None:
    with running_web() as web, web.client() as client:
        web.submit()  # the process has found out how Redis confirms
        client.config_set("appendfsync", "no")

        def submit() -> tuple[int, Any]:
            response = web.http.post("/v1/jobs", json={"prompt": "once"}, headers={"Idempotency-Key": "k"})
            return response.status_code, response.json()

        status, problem = submit()
        assert (status, problem["code"]) == (503, "not_durable")
        client.config_set("appendfsync", "always")
        status, job = submit()
        assert status == 202 and len(jobs_of(client)) == 2
        assert client.hget("mlxq:job:" + job["id"], "idempotency_key") == "k"


def test_repeated_request_is_confirmed_again(valkey_client: Redis) -> None:
    jobs = Jobs(valkey_client, Settings())
    submission = Submission(Request("m", 1, Sampling(0.0), prompt="hi"), owner="me", idempotency_key="k")
    job = jobs.create(submission).job
    try:
        valkey_client.config_set("appendfsync", "no")
        with pytest.raises(NotDurable):
            jobs.create(submission)  # another connection may have written the record
    finally:
        valkey_client.config_set("appendfsync", "always")
    again = jobs.create(submission)
    assert (again.job, again.new) == (job, False)
    assert valkey_client.ttl("mlxq:job:" + job.id) == -1


def test_flushed_scripts_are_loaded_again(valkey_client: Redis) -> None:
    jobs = Jobs(valkey_client, Settings())
    submission = Submission(Request("m", 1, Sampling(0.0), prompt="hi"), owner="me")
    jobs.create(submission)
    valkey_client.script_flush()
    accepted = jobs.create(submission)
    assert accepted.new and jobs.get(accepted.job.id, "me") == accepted.job


def test_unreachable_redis_is_not_reported_as_not_durable(valkey_client: Redis) -> None:
    with connect("unix:///missing/s", retries=0) as client, pytest.raises(RedisConnectionError):
        Jobs(client, Settings()).create(Submission(Request("m", 1, Sampling(0.0), prompt="hi"), owner="me"))


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_demoted_redis_rejects_jobs_until_it_is_a_master_again(known: bool) -> None:
    with running_web() as web, web.client() as client:
        if known:
            web.submit()
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())  # no server listens there
        response = web.http.post("/v1/jobs", json={"prompt": "hi"})
        assert (response.status_code, response.json()["code"]) == (503, "unavailable")
        assert response.headers["Retry-After"] == "1"
        view = web.http.get("/health").json()
        assert view["status"] == "down" and not any("on disk" in reason for reason in view["reasons"])
        with pytest.raises(ReadOnlyError):
            why_unproven(client)
        client.execute_command("REPLICAOF", "NO", "ONE")
        web.submit()


def test_missing_confirmation_does_not_affect_concurrent_calls(
    valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = ProvenScript(valkey_client, "enqueue")
    called, failed = threading.Event(), threading.Event()

    def call(args: list[str], proof: Any) -> tuple[Any, Any]:
        if args == ["unconfirmed"]:
            return "created", [0, 0]
        called.set()
        assert failed.wait(10)
        return "created", [1, 0]

    monkeypatch.setattr(enqueue, "_call", call)
    with ThreadPoolExecutor(1) as pool:
        confirmed = pool.submit(enqueue, ["confirmed"])
        assert called.wait(10)
        with pytest.raises(NotDurable):
            enqueue(["unconfirmed"])
        failed.set()
        assert confirmed.result(10) == "created"


@contextmanager
def ready(web: WebStack) -> Iterator[None]:
    """Run a fake worker."""
    worker = StubWorker(web.redis_url)
    worker.announce()
    worker.start()
    try:
        yield
    finally:
        worker.stop()
