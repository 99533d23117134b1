"""Redis out of memory (`noeviction`): new jobs are rejected, and accepted jobs run and end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.client.api import Client, Refused
from shared.jobs.log import JobLog
from shared.jobs.record import Status
from shared.redis.client import Redis
from tests.plugins.stack import Stack, made_stack
from tests.plugins.web_stack import running_web
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from tests.support.waiting import eventually
from web.access.api_keys import new_key
from worker.runner.fake import FakeRunner

TOKENS = 100
LEASE_S = 1


@pytest.fixture
def stack() -> Iterator[Stack]:
    """An API whose only limit is Redis's memory: the other limits follow from that one unless they are set."""
    unlimited = {"QUEUE_BYTES": str(2**40), "QUEUE_BYTES_PER_KEY": str(2**40)}
    for stack in made_stack(Path("fake"), {"BACKEND": "fake", **unlimited}):
        stack.start_web()
        yield stack


@contextmanager
def memory_full(redis: Redis) -> Iterator[None]:
    """Set the memory limit far below the used memory, so that ending jobs do not free enough."""
    redis.config_set("maxmemory", redis.info("memory")["used_memory"] // 2)
    try:
        yield
    finally:
        redis.config_set("maxmemory", 0)


def body(n: int) -> dict[str, Any]:
    return {"prompt": prompt(n), "max_tokens": TOKENS, "seed": n}


def prompt(n: int) -> str:
    return f"!pause=0.02 number {n}"


def check(stack: Stack, client: Client, n: int, job_id: str) -> None:
    """Check that a job ends with the text of an uninterrupted run, and that its log has no gap."""
    job = eventually(lambda: (j := client.job(job_id, wait_s=10)).status.terminal and j)
    runner = FakeRunner()
    expected = run_alone(sequence_for(claimed(prompt(n), max_tokens=TOKENS, seed=n), runner), runner)
    assert (job.status, job.text) == (Status.SUCCEEDED, text_of(expected))
    events = JobLog(stack.redis).read(job_id)
    assert "".join(event.text for event in events) == job.text
    assert [event.n for event in events] == list(range(1, len(events) + 1))


@pytest.fixture(autouse=True)
def _run_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)  # of the uninterrupted run in this process


def assert_rejected(client: Client, n: int) -> None:
    with pytest.raises(Refused) as caught:
        client.submit(body(n))
    assert (caught.value.status, caught.value.code) == (503, "queue_memory_full")
    assert caught.value.retry_after


def try_submit(client: Client, n: int) -> str:
    """Submit a job; return its id, or an empty string if it is rejected."""
    try:
        return client.submit(body(n)).id
    except Refused:
        return ""


@pytest.mark.slow
def test_accepted_jobs_start_and_end_while_new_ones_are_rejected(stack: Stack) -> None:
    worker = stack.start_worker(SLOTS="4", LEASE_S=str(LEASE_S))
    [before] = stack.ready_workers()
    with stack.client() as client:
        jobs = [client.submit(body(n), idempotency_key=f"k{n}").id for n in range(10)]
        eventually(lambda: stack.slots_used() == 4, "all slots are taken")
        with memory_full(stack.redis):
            assert_rejected(client, 99)
            assert client.submit(body(0), idempotency_key="k0").id == jobs[0], "a repeated request is accepted"
            client.cancel(jobs[3])
            client.cancel(jobs[9])
            for n in (0, 1, 2, 4, 5, 6, 7, 8):
                check(stack, client, n, jobs[n])
            assert [client.job(jobs[n], wait_s=10).status for n in (3, 9)] == [Status.CANCELLED] * 2
            client.request("DELETE", f"/v1/jobs/{jobs[3]}")
            view = client.request("GET", "/health").json()
            assert view["status"] == "degraded" and "no memory left" in view["reasons"][0]
            [now] = stack.ready_workers()
            assert now.id == before.id and now.heartbeat_at > before.heartbeat_at + 3 * LEASE_S
            assert_rejected(client, 99)
        later = eventually(lambda: try_submit(client, 10), "the API notices that there is memory again")
        check(stack, client, 10, later)
    assert worker.poll() is None
    assert "CRITICAL" not in stack.log("worker-0")


@pytest.mark.slow
def test_worker_that_starts_without_free_memory_runs_accepted_jobs(stack: Stack) -> None:
    with stack.client() as client:
        jobs = [client.submit(body(n)).id for n in range(3)]
        with memory_full(stack.redis):
            worker = stack.start_worker(SLOTS="4", LEASE_S=str(LEASE_S))
            for n, job in enumerate(jobs):
                check(stack, client, n, job)
    assert worker.poll() is None
    assert "CRITICAL" not in stack.log("worker-0")


@pytest.mark.slow
def test_jobs_of_a_worker_that_is_killed_are_recovered(stack: Stack) -> None:
    worker = stack.start_worker(SLOTS="4", LEASE_S=str(LEASE_S))
    with stack.client() as client:
        jobs = [client.submit(body(n)).id for n in range(3)]
        eventually(lambda: stack.slots_used() == 3)
        with memory_full(stack.redis):
            worker.kill()
            eventually(lambda: {client.job(job).status for job in jobs} == {Status.QUEUED}, "the jobs are queued again")
            stack.spawn_worker(SLOTS="4", LEASE_S=str(LEASE_S))
        for n, job in enumerate(jobs):
            check(stack, client, n, job)


def test_rate_limits_still_apply() -> None:
    with running_web(RATE_LIMIT="5/minute", READ_RATE_LIMIT="5/minute") as web, web.client() as client:
        headers = {"X-API-Key": web.keys.create(new_key(), ["infer"])}
        with memory_full(client):
            statuses = [web.http.get("/v1/jobs", headers=headers).status_code for _ in range(6)]
            assert statuses == [200] * 5 + [429]
            response = web.http.post("/v1/jobs", json={"prompt": "hi"})
            assert (response.status_code, response.json()["code"]) == (503, "queue_memory_full")
        eventually(lambda: web.http.post("/v1/jobs", json={"prompt": "hi"}).status_code == 202)
