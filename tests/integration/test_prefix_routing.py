"""Prefix routing with two real workers: jobs go to the worker that has their prefix, but do not wait for it long."""

from __future__ import annotations

import signal
import subprocess

import pytest

from scripts.client.api import Client, RemoteJob
from shared.jobs.record import Job, Status
from shared.redis import keys
from tests.plugins.fleet import SLOW, Fleet
from tests.plugins.stack import Stack
from tests.support.waiting import eventually

Worker = subprocess.Popen[bytes]

PREFIX = ("0123456789abcdef",)
LONG_LEASE = "60"


def on(fleet: Fleet, job: Job) -> str:
    """Return the worker that claimed a job."""
    eventually(lambda: fleet.get(job).history, within_s=20)
    return fleet.get(job).history[-1].worker


def name(fleet: Fleet, worker: Worker) -> str:
    card = fleet.card(worker)
    assert card is not None
    return card.id


def pair(fleet: Fleet, slots: str = "4") -> tuple[Worker, Worker]:
    """Start two workers. Returns the preferred worker, which has the prefix, and the other one."""
    workers = [fleet.start(SLOTS=slots, LEASE_S=LONG_LEASE) for _ in range(2)]
    first = on(fleet, fleet.submit("first", prefixes=PREFIX))
    eventually(lambda: not any(card.slots_used for card in fleet.registry.workers()))
    preferred, other = sorted(workers, key=lambda worker: name(fleet, worker) != first)
    return preferred, other


def outcomes(fleet: Fleet) -> dict[str, int]:
    return {outcome: n for (_, outcome), n in fleet.registry.routed().items()}


def text(subject: int, about: str) -> str:
    return "".join(f"{subject}.{n} is said of {about}. " for n in range(20))


def ask(client: Client, messages: list[dict[str, str]]) -> RemoteJob:
    job = client.submit({"messages": messages, "temperature": 0, "max_tokens": 4}, wait_s=60)
    while not job.status.terminal:
        job = client.job(job.id, wait_s=60)
    assert job.status is Status.SUCCEEDED
    return job


def test_each_turn_of_a_conversation_reuses_the_previous_turn(tiny_stack: Stack) -> None:
    for _ in range(2):
        tiny_stack.start_worker(PREFIX_DISK_BYTES="0", SLOTS="4")
    conversations = [[{"role": "user", "content": text(subject, "mice")}] for subject in range(3)]
    known, hits = [0, 0, 0], 0
    with tiny_stack.client() as client:
        for turn in range(4):
            for subject, messages in enumerate(conversations):
                job = ask(client, messages)
                hits += 0 < known[subject] <= job.usage["cached_tokens"]
                # The prompt of the next turn does not contain the generation prompt at the end of this one.
                known[subject] = job.usage["prompt_tokens"] - 8
                messages += [{"role": "assistant", "content": job.text}, {"role": "user", "content": text(turn, "men")}]
        page = client.request("GET", "/metrics").text
    routed = {outcome: n for (_, outcome), n in tiny_stack.registry.routed().items()}
    assert f'mlxq_jobs_routed_total{{model="{tiny_stack.model}",outcome="preferred"}} {routed["preferred"]:.1f}' in page
    assert hits >= routed["preferred"] == 9 - routed.get("another", 0)
    assert routed["preferred"] > 5, "prefix routing was rarely used; on a very slow machine this can happen"


def test_jobs_with_a_common_prefix_go_to_one_worker_and_others_to_both(fleet: Fleet) -> None:
    preferred, other = pair(fleet)
    for n in range(8):
        job = fleet.submit(f"again {n}", prefixes=PREFIX)
        fleet.check(job)
        assert on(fleet, job) == name(fleet, preferred)
    jobs = [fleet.submit(f"{SLOW} {n}", 100) for n in range(8)]
    assert {on(fleet, job) for job in jobs} == {name(fleet, preferred), name(fleet, other)}
    for job in jobs:
        fleet.check(job)


def test_a_job_does_not_wait_for_a_full_preferred_worker(fleet: Fleet) -> None:
    preferred, other = pair(fleet, slots="1")
    long = fleet.submit(f"{SLOW} long", 4000, prefixes=PREFIX)
    assert on(fleet, long) == name(fleet, preferred)
    job = fleet.submit("next", prefixes=PREFIX)
    fleet.check(job)
    assert on(fleet, job) == name(fleet, other)
    assert fleet.get(long).status is Status.RUNNING


def test_a_job_does_not_wait_for_a_preferred_worker_that_died_unnoticed(fleet: Fleet) -> None:
    preferred, other = pair(fleet)
    survivor = name(fleet, other)
    preferred.kill()
    preferred.wait()
    jobs = [fleet.submit(f"{n}", prefixes=PREFIX) for n in range(3)]
    for job in jobs:
        fleet.check(job)
        assert (on(fleet, job), fleet.get(job).attempt) == (survivor, 1)
    assert fleet.redis.zcard(keys.LEASES) == 2, "the dead worker must still hold its lease"


def test_a_job_does_not_wait_for_a_frozen_preferred_worker(fleet: Fleet) -> None:
    preferred, other = pair(fleet)
    frozen, awake = (name(fleet, worker) for worker in (preferred, other))
    preferred.send_signal(signal.SIGSTOP)
    try:
        jobs = [fleet.submit(f"{n}", prefixes=PREFIX) for n in range(3)]
        for job in jobs:
            fleet.check(job)
            assert (on(fleet, job), fleet.get(job).attempt) == (awake, 1)
        assert fleet.redis.zscore(keys.LEASES, frozen) is not None
    finally:
        preferred.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("slots", ["1", "4"])
def test_under_a_load_of_one_prefix_both_workers_serve_and_no_job_starves(fleet: Fleet, slots: str) -> None:
    preferred, other = pair(fleet, slots)
    load = [fleet.submit(f"{SLOW} {n}", 10 + n % 7, prefixes=PREFIX) for n in range(40)]
    others = [fleet.submit(f"other {n}", 10) for n in range(5)]
    for job in (*others, *load):
        fleet.check(job)
        assert fleet.get(job).attempt == 1
    assert {on(fleet, job) for job in load} == {name(fleet, preferred), name(fleet, other)}
    assert outcomes(fleet)["preferred"] > 0
