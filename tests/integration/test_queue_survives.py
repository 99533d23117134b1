"""Crashes and restarts of real processes do not change the text of a job. Uses the tiny random model."""

from __future__ import annotations

import signal
from typing import Any

from scripts.client.api import Client
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from shared.queue.wakeups import Notifier, make_app
from shared.redis import keys
from tests.plugins.stack import Stack
from tests.support.waiting import eventually


def body(n: int, tokens: int = 200) -> dict[str, Any]:
    """Return a request that is greedy for even n, and sampled with a seed for odd n."""
    return {
        "prompt": f"Number {n}:",
        "max_tokens": tokens,
        **({"temperature": 1.0, "seed": n} if n % 2 else {"temperature": 0}),
    }


def finish(client: Client, job_id: str) -> str:
    job = client.job(job_id, wait_s=30)
    while not job.status.terminal:
        job = client.job(job_id, wait_s=30)
    assert job.status is Status.SUCCEEDED, job
    return job.text


def test_extra_and_lost_wakeups_change_nothing(tiny_stack: Stack) -> None:
    with tiny_stack.client() as client:
        jobs = [client.submit(body(n, 10)).id for n in range(6)]
        tiny_stack.start_worker()  # the wake-ups were sent before a worker existed
        texts = [finish(client, job) for job in jobs]
        Notifier(make_app(tiny_stack.settings)).wake([tiny_stack.model, "no such model"] * 3)
        again = [finish(client, client.submit(body(n, 10)).id) for n in range(6)]
        assert again == texts
        assert all(client.job(job).text == text for job, text in zip(jobs, texts, strict=True))


def test_jobs_of_a_killed_worker_are_resumed_with_the_same_text(tiny_stack: Stack) -> None:
    tokens = 600
    first = tiny_stack.start_worker()
    with tiny_stack.client() as client:
        reference = [client.submit(body(n, tokens)).id for n in range(4)]
        uninterrupted = [finish(client, job) for job in reference]
        jobs = [client.submit(body(n, tokens)).id for n in range(4)]
        streams = [client.events(job) for job in jobs]
        received = [[next(stream) for _ in range(10)] for stream in streams]
        tiny_stack.stop(first, signal.SIGKILL)  # at once: starting a worker takes longer than these jobs run
        tiny_stack.start_worker()
        for events, stream in zip(received, streams, strict=True):
            events.extend(stream)
        assert ["".join(event.text for event in events) for events in received] == uninterrupted
        assert [finish(client, job) for job in jobs] == uninterrupted
        assert any(EventKind.RESUMED in {event.kind for event in events} for events in received)
        for events, job in zip(received, jobs, strict=True):
            assert [event.n for event in events] == list(range(1, len(events) + 1))
            assert client.job(job).usage["completion_tokens"] <= tokens


def test_stopped_worker_hands_back_its_jobs_and_deregisters(tiny_stack: Stack) -> None:
    worker = tiny_stack.start_worker(DRAIN_S="0.05")
    with tiny_stack.client() as client:
        uninterrupted = finish(client, client.submit(body(1, 600)).id)
        job = client.submit(body(1, 600)).id
        events = client.events(job)
        next(event for event in events if event.kind is EventKind.CHUNK)
        assert tiny_stack.stop(worker) == 0, tiny_stack.log("worker-0")
        assert client.job(job).status is Status.QUEUED
        assert tiny_stack.registry.workers() == []
        tiny_stack.start_worker()
        assert finish(client, job) == uninterrupted


def test_job_waits_for_a_worker(tiny_stack: Stack) -> None:
    with tiny_stack.client() as client:
        job = client.submit(body(0, 5)).id
        assert client.job(job, wait_s=1).status is Status.QUEUED
        tiny_stack.start_worker()
        finish(client, job)


def test_job_runs_on_when_the_api_crashes(tiny_stack: Stack) -> None:
    tiny_stack.start_worker()
    with tiny_stack.client() as client:
        uninterrupted = finish(client, client.submit(body(2, 300)).id)
        job = client.submit(body(2, 300)).id
        tiny_stack.stop(tiny_stack.processes[0], signal.SIGKILL)
        eventually(lambda: tiny_stack.redis.hget(keys.JOB + job, "status") == "succeeded", "the job ends")
        assert tiny_stack.redis.get(keys.OUTPUT + job) == uninterrupted


def test_more_jobs_than_slots_all_end(tiny_stack: Stack) -> None:
    tiny_stack.start_worker(SLOTS="3")
    with tiny_stack.client() as client:
        jobs = [client.submit(body(n, 20)).id for n in range(20)]
        assert len({finish(client, job) for job in jobs}) > 1
        assert tiny_stack.redis.zcard(keys.QUEUE + tiny_stack.model) == 0
        eventually(lambda: tiny_stack.slots_used() == 0, "all slots are free")
