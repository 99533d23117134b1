"""BROKER_URL beside REDIS_URL: either may be killed while jobs run, and the other lives."""

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
from shared.queue import keys
from tests.plugins.stack import Stack, fake_stack_on
from tests.plugins.work import undisturbed
from tests.support.servers import Server
from tests.support.waiting import eventually
from worker.queue.claimer import POLL_S

SLOW = "!pause=0.02"
"""Order for the fake backend: a step takes 20 ms."""
SLACK_S = 1.0
"""What a busy test machine adds."""


class Apart(NamedTuple):
    """A stack, its queue and its broker, which keeps nothing when it dies."""

    stack: Stack
    queue: Server
    broker: Server


@pytest.fixture
def apart() -> Iterator[Apart]:
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder,
        closing(Server(Path(folder) / "q", "a", "appendonly yes", "appendfsync always")) as queue,
        closing(Server(Path(folder) / "b", "b")) as broker,
        fake_stack_on(
            f"redis://:a@127.0.0.1:{queue.port}/0", BROKER_URL=f"redis://:b@127.0.0.1:{broker.port}/1", SLOTS="2"
        ) as stack,
    ):
        yield Apart(stack, queue, broker)


def submit(client: Client, prompt: str, max_tokens: int = 50) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "seed": 0, "temperature": 0}
    return client.submit(body, idempotency_key=prompt.replace(" ", "-")).id


def check(client: Client, job_id: str, prompt: str, max_tokens: int = 50) -> None:
    """It ends once, with its whole text, told without gap."""
    events = list(client.events(job_id))
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events].count(EventKind.DONE) == 1
    job = client.job(job_id)
    assert job.status is Status.SUCCEEDED
    assert job.text == "".join(event.text for event in events) == undisturbed(prompt, max_tokens)


def test_broker_and_queue_keep_to_their_own_keys(apart: Apart) -> None:
    with apart.stack.client() as client:
        apart.stack.start_worker()
        job = submit(client, "apart")
        check(client, job, "apart")
        assert apart.queue.client.exists(keys.JOB + job)
        assert not [key for key in apart.queue.client.scan_iter() if not key.startswith(("mlxq:", "LIMITS"))]
        apart.broker.client.select(1)
        assert not [key for key in apart.broker.client.scan_iter() if key.startswith("mlxq:")]


def test_without_the_broker_jobs_are_accepted_and_start(apart: Apart) -> None:
    apart.stack.start_worker()
    with apart.stack.client() as client:
        running = {submit(client, prompt, 150): prompt for prompt in (f"{SLOW} 1", f"{SLOW} 2")}
        eventually(lambda: apart.stack.slots_used() == 2, "both run")
        waiting = {submit(client, prompt): prompt for prompt in ("3", "4", "5")}
        apart.broker.kill()
        waiting[submit(client, "6")] = "6"
        for job, prompt in running.items():
            check(client, job, prompt, 150)
        for job, prompt in waiting.items():
            check(client, job, prompt)
        assert client.request("GET", "/readyz").is_success
        apart.broker.start()
        check(client, submit(client, "7"), "7")


def test_a_job_starts_within_a_look_of_a_worker_with_room_while_the_broker_is_away(apart: Apart) -> None:
    apart.stack.start_worker()
    apart.broker.kill()
    with apart.stack.client() as client:
        for n in range(5):
            job = submit(client, f"{n}")
            check(client, job, f"{n}")
            record = apart.queue.client.hgetall(keys.JOB + job)
            assert float(record["started_at"]) - float(record["created_at"]) < POLL_S + SLACK_S


def test_short_jobs_run_at_full_rate_while_the_broker_is_away(apart: Apart) -> None:
    """A row that ends makes room, and room is filled at once: nobody waits for a message or for the next look."""
    apart.broker.kill()
    with apart.stack.client() as client, ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda n: submit(client, f"{SLOW} {n}", 5), range(200)))
        apart.stack.spawn_worker(SLOTS="8")
        ended = list(pool.map(lambda job: to_end(client, job), jobs))
    assert {job.status for job in ended} == {Status.SUCCEEDED}
    records = [apart.queue.client.hgetall(keys.JOB + job) for job in jobs]
    began = min(float(record["started_at"]) for record in records)
    took = max(float(record["finished_at"]) for record in records) - began
    busy = sum(float(record["finished_at"]) - float(record["started_at"]) for record in records)
    assert busy / took > 0.6 * 8, "the slots were mostly full"


def to_end(client: Client, job_id: str) -> RemoteJob:
    return eventually(lambda: (job := client.job(job_id, wait_s=10)).status.terminal and job, within_s=60)


def test_a_worker_told_to_stop_without_a_broker_hands_its_jobs_back(apart: Apart) -> None:
    worker = apart.stack.start_worker(DRAIN_S="0.2")
    with apart.stack.client() as client:
        job = submit(client, SLOW, 200)
        eventually(lambda: client.job(job).text, "it runs")
        apart.broker.kill()
        assert apart.stack.stop(worker) == 0, apart.stack.log("worker-0")
        assert client.job(job).status is Status.QUEUED
        apart.broker.start()
        apart.stack.start_worker()
        check(client, job, SLOW, 200)


def test_without_the_queue_nothing_is_accepted_and_nothing_is_lost(apart: Apart) -> None:
    apart.stack.start_worker()
    with apart.stack.client() as client:
        running, waiting = submit(client, SLOW, 200), [submit(client, f"{SLOW} {n}") for n in range(4)]
        eventually(lambda: client.job(running).text, "it runs")
        apart.queue.kill()
        with pytest.raises(Refused) as caught:
            submit(client, "now")
        assert caught.value.status == 503
        apart.queue.start()
        later = eventually(lambda: accepted(client, "later"), "submissions are accepted")
        check(client, running, SLOW, 200)
        check(client, later, "later")
        for n, job in enumerate(waiting):
            check(client, job, f"{SLOW} {n}")


def accepted(client: Client, prompt: str) -> str:
    """A job's id, once it is accepted."""
    try:
        return submit(client, prompt)
    except ClientError:
        return ""


def test_a_worker_that_starts_without_a_broker_runs_jobs_and_ends_in_order(apart: Apart) -> None:
    apart.broker.kill()
    worker = apart.stack.start_worker()
    with apart.stack.client() as client:
        check(client, submit(client, "one"), "one")
        assert apart.stack.stop(worker, within_s=10) == 0, apart.stack.log("worker-0")
