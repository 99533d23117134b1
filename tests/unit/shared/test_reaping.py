"""The reaper: when leases expire, outages that extend them, and the recovery of lost jobs."""

from __future__ import annotations

import json

import pytest

from shared.errors import JobFailure
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import AttemptEnd, Job, Priority, Status
from shared.jobs.store import Jobs
from shared.queue.claims import WriteResult
from shared.queue.recovery import REAP_S
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, lapse, lease, make_reaper, reap, reserved, row, started, submit, taken
from tests.support.waiting import eventually

OUTAGES = ["failover", "unreachable"]


class Harness:
    """A worker with a running job, and a reaper."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.worker = lease(client, "w1")
        self.reaper = make_reaper(client)
        self.job = submit(self.jobs)
        self.claimed = started(self.worker)
        self.reaper.reap()

    def outage(self, kind: str) -> None:
        """Simulate an outage of Redis during which the lease expired."""
        lapse(self.client, "w1")
        changed = {"server": "before"} if kind == "failover" else {"at": self.passed_at() - 3}
        self.client.hset(keys.PASSED, mapping=changed)

    def passed_at(self) -> float:
        return float(self.client.hget(keys.PASSED, "at"))

    def remaining_s(self) -> float:
        """Return the remaining time of the lease."""
        seconds, micros = self.client.time()
        return float(self.client.zscore(keys.LEASES, "w1")) - seconds - micros / 1e6

    def get(self, job: Job | None = None) -> Job:
        return self.jobs.get((job or self.job).id, "a")

    @property
    def status(self) -> Status:
        return self.get().status


@pytest.fixture
def harness(client: Redis, settings: Settings) -> Harness:
    return Harness(client, settings)


# Expiry of leases


def test_lease_that_is_not_renewed_expires(harness: Harness) -> None:
    lapse(harness.client, "w1")
    assert harness.reaper.reap() == [MODEL]
    assert not harness.client.exists(keys.LEASES, keys.EXTENSIONS, keys.RUNNING + "w1", keys.RESERVED + "w1")


@pytest.mark.parametrize("kind", OUTAGES)
def test_outage_extends_a_lease_by_its_full_lifetime(harness: Harness, kind: str) -> None:
    harness.outage(kind)
    assert harness.reaper.reap() == []
    assert harness.remaining_s() == pytest.approx(60, abs=5)
    assert harness.worker.renew(60).unbroken
    assert harness.status is Status.RUNNING and not harness.client.hexists(keys.JOB + harness.job.id, "deaths")


@pytest.mark.parametrize("kind", OUTAGES)
def test_worker_that_died_in_an_outage_loses_its_lease_after_the_extension(harness: Harness, kind: str) -> None:
    harness.outage(kind)
    harness.reaper.reap()
    lapse(harness.client, "w1")
    assert harness.reaper.reap() == [MODEL]


def test_second_outage_does_not_extend_the_lease_of_a_dead_worker(harness: Harness) -> None:
    harness.outage(OUTAGES[0])
    harness.reaper.reap()
    harness.outage(OUTAGES[1])
    assert harness.reaper.reap() == [MODEL]


@pytest.mark.parametrize("kind", OUTAGES)
def test_lease_that_is_renewed_between_outages_is_extended_each_time(harness: Harness, kind: str) -> None:
    for _ in range(3):
        harness.outage(kind)
        assert harness.reaper.reap() == []
        harness.worker.renew(60)
    assert harness.status is Status.RUNNING


def test_several_reapers_may_pass_after_an_outage(harness: Harness) -> None:
    harness.outage(OUTAGES[0])
    assert [reap(harness.client) for _ in range(3)] == [[], [], []]
    assert harness.status is Status.RUNNING


def test_passes_shortly_after_another_write_nothing(harness: Harness) -> None:
    before = harness.passed_at()
    reap(harness.client)
    assert harness.passed_at() == before


def test_clock_may_be_set_back(harness: Harness) -> None:
    harness.client.hset(keys.PASSED, "at", harness.passed_at() + 3600)
    harness.reaper.reap()
    harness.worker.renew(60)
    harness.outage(OUTAGES[1])
    assert harness.reaper.reap() == []


def test_jobs_of_a_dead_worker_are_recovered_after_the_clock_was_set_back(harness: Harness) -> None:
    hour = harness.passed_at() + 3600
    harness.client.zadd(keys.LEASES, {"w1": hour})
    harness.client.hset(keys.EXTENSIONS, "w1", 0.1)
    harness.client.hset(keys.PASSED, "at", hour)
    eventually(harness.reaper.reap, "the lease expires by the new clock")
    assert harness.status is Status.QUEUED


def test_next_pass_is_due_when_a_lease_may_expire(harness: Harness) -> None:
    assert harness.reaper.rest_s == REAP_S
    harness.worker.renew(0.3)
    harness.reaper.reap()
    assert 0.05 <= harness.reaper.rest_s < 0.35
    harness.worker.renew(0.001)
    harness.reaper.reap()
    assert 0.05 <= harness.reaper.rest_s <= REAP_S
    harness.worker.retire()
    harness.reaper.reap()
    assert harness.reaper.rest_s == REAP_S


def test_pass_records_the_memory_of_the_server(valkey_client: Redis) -> None:
    reap(valkey_client)
    memory = valkey_client.hgetall(keys.MEMORY)
    assert 0 < int(memory["used"]) < int(memory["system"]) and memory["max"] == "0"


# Recovery of jobs


def test_jobs_of_a_dead_worker_return_in_their_order(harness: Harness) -> None:
    waiting = submit(harness.jobs)
    urgent = submit(harness.jobs, priority=Priority.HIGH)
    behind = submit(harness.jobs)
    assert [each.job.id for each in reserved(harness.worker, 2)] == [urgent.id, waiting.id]
    lapse(harness.client, "w1")
    harness.reaper.reap()
    other = lease(harness.client, "w2")
    assert [each.job.id for each in reserved(other, 9)] == [urgent.id, harness.job.id, waiting.id, behind.id]


def test_lost_reservation_counts_neither_as_attempt_nor_as_crash(harness: Harness) -> None:
    waiting = submit(harness.jobs)
    taken(harness.worker)
    lapse(harness.client, "w1")
    harness.reaper.reap()
    job = harness.get(waiting)
    assert (job.attempt, job.history) == (0, ())
    assert not harness.client.hexists(keys.JOB + waiting.id, "deaths")
    assert [event.kind for event in JobLog(harness.client).read(waiting.id)] == [EventKind.QUEUED]


def test_job_that_crashes_its_workers_fails_with_a_history(client: Redis, settings: Settings) -> None:
    jobs, log = Jobs(client, settings), JobLog(client)
    job = submit(jobs)
    for attempt in range(1, 5):
        worker = lease(client, f"w{attempt}")
        claimed = started(worker)
        worker.append([row(claimed, claimed.job.last_event + 2, f"{attempt}é ", attempt, attempt)])
        if attempt == 2:
            worker.retire()  # not a crash
            continue
        client.hset(keys.JOB + job.id, "admitted_at", float(client.time()[0]) - 100 * attempt)
        lapse(client, f"w{attempt}")
        reap(client)
    failed = jobs.get(job.id, "a")
    assert (failed.status, failed.error_code) == (Status.FAILED, JobFailure.WORKER_LOST)
    message = failed.error_message or ""
    assert message.startswith("This job was running each time its worker process crashed: attempt 1 after 10")
    assert ", attempt 3 after 30" in message and ", attempt 4 after 40" in message and "attempt 2" not in message
    assert [each.how for each in failed.history] == [
        AttemptEnd.WORKER_LOST, AttemptEnd.HANDED_BACK, AttemptEnd.WORKER_LOST, AttemptEnd.WORKER_LOST,
    ]  # fmt: skip
    assert (jobs.text(failed), failed.completion_tokens) == ("1é 2é 3é 4é ", 8)
    last = log.read(job.id)[-1]
    assert (last.kind, json.loads(last.data)) == (EventKind.DONE, {"status": "failed"})


def test_late_write_for_a_failed_job_is_fenced(client: Redis, settings: Settings) -> None:
    jobs = Jobs(client, settings)
    submit(jobs)
    worker = lease(client, "w1")
    claimed = started(worker)
    lapse(client, "w1")
    reap(client, max_deaths=1)
    assert worker.append([row(claimed, 3, "late", 1)]) == [WriteResult.FENCED]
    assert client.hgetall(keys.BYTES).keys() <= {"failed", "failed_limit"}


@pytest.mark.parametrize(("pid", "remaining"), [(1, 0), (2, 1)])
def test_crash_deletes_the_state_of_its_own_process_only(client: Redis, pid: int, remaining: int) -> None:
    """A restarted process has the same node name, and the lease of its predecessor may expire later."""
    lease(client, "w1")
    client.set(keys.WORKER + "w1", json.dumps({"id": "w1", "node": "n", "pid": 1}))
    client.set(keys.HOST + "n", json.dumps({"node": "n", "pid": pid}))
    client.zadd(keys.HOSTS, {"n": 1})
    lapse(client, "w1")
    reap(client)
    assert (client.exists(keys.HOST + "n"), client.zcard(keys.HOSTS)) == (remaining, remaining)
