"""Two workers as they are run: jobs go where their prefix is, and wait there for nobody who does not come."""

from __future__ import annotations

import signal
import subprocess

import pytest

from scripts.client.api import Client, RemoteJob
from shared.jobs.record import Job, Status
from shared.queue import keys
from tests.plugins.fleet import SLOW, Fleet, wait
from tests.plugins.stack import Stack

Worker = subprocess.Popen[bytes]

PREFIX = ("0123456789abcdef",)
LONG_LEASE = "60"


def on(fleet: Fleet, job: Job) -> str:
    """The worker that a job went to."""
    wait(lambda: fleet.get(job).history, 20)
    return fleet.get(job).history[-1].worker


def name(fleet: Fleet, worker: Worker) -> str:
    card = fleet.card(worker)
    assert card is not None
    return card.id


def pair(fleet: Fleet, slots: str = "4") -> tuple[Worker, Worker]:
    """Two workers: the one that has a prefix, and another."""
    workers = [fleet.start(SLOTS=slots, LEASE_S=LONG_LEASE) for _ in range(2)]
    first = on(fleet, fleet.submit("first", prefixes=PREFIX))
    wait(lambda: not any(card.slots_used for card in fleet.registry.workers()))
    keeper, other = sorted(workers, key=lambda worker: name(fleet, worker) != first)
    return keeper, other


def outcomes(fleet: Fleet) -> dict[str, int]:
    return {outcome: n for (_, outcome), n in fleet.registry.routed().items()}


def text(subject: int, about: str) -> str:
    return "".join(f"{subject}.{n} is said of {about}. " for n in range(20))


def ask(client: Client, said: list[dict[str, str]]) -> RemoteJob:
    job = client.submit({"messages": said, "temperature": 0, "max_tokens": 4}, wait_s=60)
    while not job.status.terminal:
        job = client.job(job.id, wait_s=60)
    assert job.status is Status.SUCCEEDED
    return job


def test_each_turn_of_a_conversation_finds_what_the_one_before_left(tiny_stack: Stack) -> None:
    for _ in range(2):
        tiny_stack.start_worker(PREFIX_DISK_BYTES="0", SLOTS="4")
    talks = [[{"role": "user", "content": text(subject, "mice")}] for subject in range(3)]
    known, found = [0, 0, 0], 0
    with tiny_stack.client() as client:
        for turn in range(4):
            for subject, said in enumerate(talks):
                job = ask(client, said)
                found += 0 < known[subject] <= job.usage["cached_tokens"]
                known[subject] = job.usage["prompt_tokens"] - 8  # the words behind it differ: another turn or the end
                said += [{"role": "assistant", "content": job.text}, {"role": "user", "content": text(turn, "men")}]
        page = client.request("GET", "/metrics").text
    routed = {outcome: n for (_, outcome), n in tiny_stack.registry.routed().items()}
    assert f'mlxq_jobs_routed_total{{model="{tiny_stack.model}",outcome="preferred"}} {routed["preferred"]:.1f}' in page
    assert found >= routed["preferred"] == 9 - routed.get("another", 0)
    assert routed["preferred"] > 5, "but on a machine that stands still for a while"


def test_what_begins_alike_goes_to_one_worker_and_the_rest_where_there_is_room(fleet: Fleet) -> None:
    keeper, other = pair(fleet)
    for n in range(8):
        job = fleet.submit(f"again {n}", prefixes=PREFIX)
        fleet.check(job)
        assert on(fleet, job) == name(fleet, keeper)
    jobs = [fleet.submit(f"{SLOW} {n}", 100) for n in range(8)]
    assert {on(fleet, job) for job in jobs} == {name(fleet, keeper), name(fleet, other)}
    for job in jobs:
        fleet.check(job)


def test_a_full_worker_is_not_waited_for(fleet: Fleet) -> None:
    keeper, other = pair(fleet, slots="1")
    long = fleet.submit(f"{SLOW} long", 4000, prefixes=PREFIX)
    assert on(fleet, long) == name(fleet, keeper)
    job = fleet.submit("next", prefixes=PREFIX)
    fleet.check(job)
    assert on(fleet, job) == name(fleet, other)
    assert fleet.get(long).status is Status.RUNNING


def test_a_worker_that_is_dead_and_not_known_to_be_is_not_waited_for(fleet: Fleet) -> None:
    keeper, other = pair(fleet)
    survivor = name(fleet, other)
    keeper.kill()
    keeper.wait()
    jobs = [fleet.submit(f"{n}", prefixes=PREFIX) for n in range(3)]
    for job in jobs:
        fleet.check(job)
        assert (on(fleet, job), fleet.get(job).attempt) == (survivor, 1)
    assert fleet.redis.zcard(keys.LEASES) == 2, "it was thought to be alive"


def test_a_frozen_worker_delays_a_job_for_a_moment(fleet: Fleet) -> None:
    keeper, other = pair(fleet)
    frozen, awake = (name(fleet, worker) for worker in (keeper, other))
    keeper.send_signal(signal.SIGSTOP)
    try:
        jobs = [fleet.submit(f"{n}", prefixes=PREFIX) for n in range(3)]
        for job in jobs:
            fleet.check(job)
            assert (on(fleet, job), fleet.get(job).attempt) == (awake, 1)
        assert fleet.redis.zscore(keys.LEASES, frozen) is not None
    finally:
        keeper.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("slots", ["1", "4"])
def test_under_a_load_of_one_prefix_both_work_and_nothing_starves(fleet: Fleet, slots: str) -> None:
    keeper, other = pair(fleet, slots)
    load = [fleet.submit(f"{SLOW} {n}", 10 + n % 7, prefixes=PREFIX) for n in range(40)]
    beside = [fleet.submit(f"beside {n}", 10) for n in range(5)]
    for job in (*beside, *load):
        fleet.check(job)
        assert fleet.get(job).attempt == 1
    assert {on(fleet, job) for job in load} == {name(fleet, keeper), name(fleet, other)}
    assert outcomes(fleet)["preferred"] > 0
