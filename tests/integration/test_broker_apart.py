"""With BROKER_URL and REDIS_URL on separate servers, either may die while jobs run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.client.api import Client, ClientError, Refused, RemoteJob
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from shared.redis import keys
from tests.plugins.stack import Stack, fake_stack_on
from tests.plugins.work import undisturbed
from tests.support.servers import Server
from tests.support.waiting import eventually
from worker.queue.claimer import POLL_S

SLOW = "!pause=0.02"
"""Prompt prefix for the fake backend: each step takes 20 ms."""
SLACK_S = 1.0
"""Time for delays of a busy test machine."""


class SeparateStack(NamedTuple):
    """A stack, its queue, and its broker, which loses its data when it dies."""

    stack: Stack
    queue: Server
    broker: Server


@pytest.fixture
def separate() -> Iterator[SeparateStack]:
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder,
        closing(Server(Path(folder) / "q", "a", "appendonly yes", "appendfsync always")) as queue,
        closing(Server(Path(folder) / "b", "b")) as broker,
        fake_stack_on(
            f"redis://:a@127.0.0.1:{queue.port}/0", BROKER_URL=f"redis://:b@127.0.0.1:{broker.port}/1", SLOTS="2"
        ) as stack,
    ):
        yield SeparateStack(stack, queue, broker)


def submit(client: Client, prompt: str, max_tokens: int = 50) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "seed": 0, "temperature": 0}
    return client.submit(body, idempotency_key=prompt.replace(" ", "-")).id


def check(client: Client, job_id: str, prompt: str, max_tokens: int = 50) -> None:
    """Check that a job succeeds once, with its whole text and events without gaps."""
    events = list(client.events(job_id))
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events].count(EventKind.DONE) == 1
    job = client.job(job_id)
    assert job.status is Status.SUCCEEDED
    assert job.text == "".join(event.text for event in events) == undisturbed(prompt, max_tokens)


def test_broker_and_queue_have_separate_keys(separate: SeparateStack) -> None:
    with separate.stack.client() as client:
        separate.stack.start_worker()
        job = submit(client, "apart")
        check(client, job, "apart")
        assert separate.queue.client.exists(keys.JOB + job)
        assert not [key for key in separate.queue.client.scan_iter() if not key.startswith(("mlxq:", "LIMITS"))]
        separate.broker.client.select(1)
        assert not [key for key in separate.broker.client.scan_iter() if key.startswith("mlxq:")]


def test_without_the_broker_jobs_are_accepted_and_start(separate: SeparateStack) -> None:
    separate.stack.start_worker()
    with separate.stack.client() as client:
        running = {submit(client, prompt, 150): prompt for prompt in (f"{SLOW} 1", f"{SLOW} 2")}
        eventually(lambda: separate.stack.slots_used() == 2, "both run")
        waiting = {submit(client, prompt): prompt for prompt in ("3", "4", "5")}
        separate.broker.kill()
        waiting[submit(client, "6")] = "6"
        for job, prompt in running.items():
            check(client, job, prompt, 150)
        for job, prompt in waiting.items():
            check(client, job, prompt)
        assert client.request("GET", "/readyz").is_success
        separate.broker.start()
        check(client, submit(client, "7"), "7")


def test_without_the_broker_a_job_starts_within_one_poll_of_a_worker(separate: SeparateStack) -> None:
    separate.stack.start_worker()
    separate.broker.kill()
    with separate.stack.client() as client:
        for n in range(5):
            job = submit(client, f"{n}")
            check(client, job, f"{n}")
            record = separate.queue.client.hgetall(keys.JOB + job)
            assert float(record["started_at"]) - float(record["created_at"]) < POLL_S + SLACK_S


def test_without_the_broker_short_jobs_run_at_full_rate(separate: SeparateStack) -> None:
    """The next job is claimed as soon as a row ends, without a wake-up and without waiting for the next poll."""
    separate.broker.kill()
    with separate.stack.client() as client, ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda n: submit(client, f"{SLOW} {n}", 5), range(200)))
        separate.stack.spawn_worker(SLOTS="8")
        ended = list(pool.map(lambda job: to_end(client, job), jobs))
    assert {job.status for job in ended} == {Status.SUCCEEDED}
    records = [separate.queue.client.hgetall(keys.JOB + job) for job in jobs]
    began = min(float(record["started_at"]) for record in records)
    took = max(float(record["finished_at"]) for record in records) - began
    busy = sum(float(record["finished_at"]) - float(record["started_at"]) for record in records)
    assert busy / took > 0.6 * 8, "the slots were in use most of the time"


def to_end(client: Client, job_id: str) -> RemoteJob:
    return eventually(lambda: (job := client.job(job_id, wait_s=10)).status.terminal and job, within_s=60)


def test_without_the_broker_a_worker_hands_its_jobs_back_when_it_stops(separate: SeparateStack) -> None:
    worker = separate.stack.start_worker(DRAIN_S="0.2")
    with separate.stack.client() as client:
        job = submit(client, SLOW, 200)
        eventually(lambda: client.job(job).text, "it runs")
        separate.broker.kill()
        assert separate.stack.stop(worker) == 0, separate.stack.log("worker-0")
        assert client.job(job).status is Status.QUEUED
        separate.broker.start()
        separate.stack.start_worker()
        check(client, job, SLOW, 200)


def test_without_the_queue_no_job_is_accepted_and_none_is_lost(separate: SeparateStack) -> None:
    separate.stack.start_worker()
    with separate.stack.client() as client:
        running, waiting = submit(client, SLOW, 200), [submit(client, f"{SLOW} {n}") for n in range(4)]
        eventually(lambda: client.job(running).text, "it runs")
        separate.queue.kill()
        with pytest.raises(Refused) as caught:
            submit(client, "now")
        assert caught.value.status == 503
        separate.queue.start()
        later = eventually(lambda: accepted(client, "later"), "submissions are accepted")
        check(client, running, SLOW, 200)
        check(client, later, "later")
        for n, job in enumerate(waiting):
            check(client, job, f"{SLOW} {n}")


def accepted(client: Client, prompt: str) -> str:
    """Return the id of a job, or an empty string while it is rejected."""
    try:
        return submit(client, prompt)
    except ClientError:
        return ""


def test_a_worker_that_starts_without_the_broker_runs_jobs_and_stops_in_order(separate: SeparateStack) -> None:
    separate.broker.kill()
    worker = separate.stack.start_worker()
    with separate.stack.client() as client:
        check(client, submit(client, "one"), "one")
        assert separate.stack.stop(worker, within_s=10) == 0, separate.stack.log("worker-0")
