"""Blame for crashes of worker processes: a poison job fails after few crashes, and no other job fails."""

from __future__ import annotations

import math
import random
from typing import Final

import pytest

from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Status
from shared.queue.recovery import report_crash
from shared.redis import keys
from shared.redis.client import Redis
from tests.support.farm import MAX_DEATHS, RESTART, Farm, Kills, Member, after_tokens, at_position, on_prefill

KINDS: Final[dict[str, Kills]] = {
    "on prefill": on_prefill,
    "after 5 tokens of each attempt": after_tokens(5),
    "after 40 tokens of each attempt": after_tokens(40),
    "at its 30th token": at_position(30),
}
DOUBLINGS: Final = {"after 40 tokens of each attempt": 3}
"""Additional crashes in which the poison job counts as proven: its patience doubles from 8 to 16, 32 and 64 tokens."""


def max_crashes(rows: int, kind: str) -> int:
    """Return the maximum number of crashes before a poison job in a batch of `rows` fails."""
    return MAX_DEATHS + 1 + math.ceil(math.log2(max(rows, 2))) + DOUBLINGS.get(kind, 0)


def field(client: Redis, member: Member, name: str) -> int:
    return int(client.hget(keys.JOB + member.id, name) or 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (8, 1), (24, 1), (24, 2)])
def test_poison_job_fails_after_few_crashes_and_no_other_job_fails(
    valkey_client: Redis, rows: int, processes: int, kind: str
) -> None:
    farm = Farm(valkey_client, processes, slots=32, seed=rows)
    good = [farm.submit(150) for _ in range((rows - 1) // 2)]
    poison = farm.submit(400, KINDS[kind])
    good += [farm.submit(150) for _ in range(rows - 1 - len(good))]
    farm.run(3000)
    assert farm.status(poison) is Status.FAILED
    assert {farm.status(each) for each in good} <= {Status.SUCCEEDED}
    assert MAX_DEATHS <= farm.deaths <= max_crashes(rows, kind)


@pytest.mark.parametrize("seed", range(4))
def test_two_late_poison_jobs_fail_and_no_other_job_fails(valkey_client: Redis, seed: int) -> None:
    rng = random.Random(seed)
    farm = Farm(valkey_client, 2, slots=16, seed=seed)
    good = [farm.submit(rng.randint(50, 200)) for _ in range(20)]
    farm.run(rng.randint(5, 40))
    poisons = [farm.submit(400, kills) for kills in rng.sample(list(KINDS.values()), 2)]
    good += [farm.submit(rng.randint(10, 100)) for _ in range(6)]
    farm.run(4000)
    assert [farm.status(each) for each in poisons] == [Status.FAILED] * 2
    assert {farm.status(each) for each in good} == {Status.SUCCEEDED}


@pytest.mark.parametrize("seed", range(4))
def test_crashes_that_no_job_causes_fail_no_job(valkey_client: Redis, seed: int) -> None:
    rng = random.Random(seed)
    farm = Farm(valkey_client, 2, slots=24, seed=seed)
    jobs = [farm.submit(rng.randint(20, 250)) for _ in range(48)]
    while farm.unfinished:
        farm.run(rng.randint(RESTART, 4 * RESTART))
        farm.kill(rng.choice(farm.processes))
    assert farm.killed >= 3
    assert {farm.status(each) for each in jobs} == {Status.SUCCEEDED}


def test_earlier_suspect_is_not_blamed_for_a_later_poison_job(valkey_client: Redis) -> None:
    farm = Farm(valkey_client, 1, slots=8)
    bystander = farm.submit(60)
    for _ in range(2):  # two crashes in a row before its first token, which no job causes
        farm.run(RESTART + 2)
        farm.kill(farm.processes[0])
    assert field(valkey_client, bystander, "suspicion") == 2
    poison = farm.submit(100, on_prefill)
    farm.run(1000)
    assert (farm.status(bystander), farm.status(poison)) == (Status.SUCCEEDED, Status.FAILED)


def test_single_crash_holds_no_job_back(valkey_client: Redis) -> None:
    farm = Farm(valkey_client, 2, slots=24)
    jobs = [farm.submit(100) for _ in range(48)]
    farm.run(30)
    farm.slots = 48
    farm.kill(farm.processes[0])
    farm.run(500)
    assert {(each.held_back, farm.status(each)) for each in jobs} == {(0, Status.SUCCEEDED)}
    assert max(each.paused for each in jobs) < RESTART, "the other process has room"


def test_jobs_of_two_consecutive_crashes_are_held_back_only_briefly(valkey_client: Redis) -> None:
    farm = Farm(valkey_client, 2, slots=24)
    jobs = [farm.submit(100) for _ in range(48)]
    farm.run(30)
    farm.slots = 48
    farm.kill(farm.processes[0])
    farm.run(5)  # the jobs run in the other process and have not proven themselves there
    farm.kill(farm.processes[1])
    farm.run(500)
    assert {farm.status(each) for each in jobs} == {Status.SUCCEEDED}
    assert 0 < max(each.held_back for each in jobs) <= 40
    assert max(each.paused for each in jobs) <= RESTART + 40


def test_crash_without_jobs_in_flight_blames_no_job(client: Redis) -> None:
    farm = Farm(client, 1, slots=4)
    job = farm.submit(50)
    farm.run(3)
    outcome = report_crash(client, ["w0-0"], [], MAX_DEATHS, "status 70")
    assert (outcome.models, outcome.suspects, outcome.failed) == (("m",), (), ())
    assert (farm.status(job), field(client, job, "suspicion")) == (Status.QUEUED, 0)
    assert not client.exists(keys.RUNNING + "w0-0")
    assert client.zscore(keys.LEASES, "w0-0") is None


def test_crash_that_is_reported_twice_counts_once(client: Redis) -> None:
    farm = Farm(client, 1, slots=4)
    job = farm.submit(50)
    farm.run(3)
    first = report_crash(client, ["w0-0"], [job.id], MAX_DEATHS, "signal 9")
    assert first.suspects == (job.id,)
    assert report_crash(client, ["w0-0"], [job.id], MAX_DEATHS, "signal 9").suspects == ()
    assert (field(client, job, "suspicion"), field(client, job, "deaths")) == (1, 1)


def test_error_names_the_attempts_and_the_exit_status(client: Redis) -> None:
    farm = Farm(client, 1, slots=4)
    poison = farm.submit(50, after_tokens(1))
    farm.run(500)
    record = client.hgetall(keys.JOB + poison.id)
    assert (record["status"], record["error_code"], farm.deaths) == ("failed", "worker_lost", MAX_DEATHS)
    message = record["error_message"]
    assert message.startswith("This job was running each time its worker process crashed: attempt 1 after ")
    assert "attempt 3 after " in message
    assert message.endswith(" Last exit: signal 9 (SIGKILL).")


def test_poison_job_that_was_cancelled_ends_as_cancelled(client: Redis) -> None:
    farm = Farm(client, 1, slots=4)
    poison = farm.submit(50, after_tokens(1))
    farm.run(2)
    client.hset(keys.JOB + poison.id, mapping={"stop_as": "cancelled", "deaths": 5})
    farm.kill(farm.processes[0])
    assert farm.status(poison) is Status.CANCELLED


def test_most_suspected_job_is_queued_last(client: Redis) -> None:
    farm = Farm(client, 1, slots=4)
    jobs = [farm.submit(50) for _ in range(3)]
    farm.run(3)
    client.hset(keys.JOB + jobs[0].id, "suspicion", 1)
    farm.kill(farm.processes[0])
    assert client.zrange(keys.QUEUE + "m", 0, -1)[-1] == jobs[0].id
    farm.run(200)
    kinds = [event.kind for event in JobLog(client).read(jobs[0].id)]
    assert kinds.count(EventKind.RESUMED) == kinds.count(EventKind.DONE) == 1
