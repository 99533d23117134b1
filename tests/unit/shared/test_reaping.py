"""When a lease lapses and when it does not, and what becomes of the jobs of a worker that is gone."""

from __future__ import annotations

import json

import pytest

from shared.errors import JobFailure
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import AttemptEnd, Job, Priority, Status
from shared.jobs.store import Jobs
from shared.queue import keys
from shared.queue.claims import REAP_S, WriteResult
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, lapse, lease, make_reaper, reap, reserved, row, started, submit, taken
from tests.support.waiting import eventually

OUTAGES = ["another server", "out of reach"]


class Desk:
    """A worker with a running job, and the reaper."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.worker = lease(client, "w1")
        self.reaper = make_reaper(client)
        self.job = submit(self.jobs)
        self.claimed = started(self.worker)
        self.reaper.reap()

    def outage(self, kind: str) -> None:
        """Redis was away, and the lease has run out meanwhile."""
        lapse(self.client, "w1")
        changed = {"server": "before"} if kind == "another server" else {"at": self.passed_at() - 3}
        self.client.hset(keys.PASSED, mapping=changed)

    def passed_at(self) -> float:
        return float(self.client.hget(keys.PASSED, "at"))

    def left_s(self) -> float:
        """What is left of the lease."""
        seconds, micros = self.client.time()
        return float(self.client.zscore(keys.LEASES, "w1")) - seconds - micros / 1e6

    def get(self, job: Job | None = None) -> Job:
        return self.jobs.get((job or self.job).id, "a")

    @property
    def status(self) -> Status:
        return self.get().status


@pytest.fixture
def desk(client: Redis, settings: Settings) -> Desk:
    return Desk(client, settings)


# When a lease lapses


def test_a_lease_that_was_not_renewed_lapses(desk: Desk) -> None:
    lapse(desk.client, "w1")
    assert desk.reaper.reap() == [MODEL]
    assert not desk.client.exists(keys.LEASES, keys.EXTENSIONS, keys.RUNNING + "w1", keys.RESERVED + "w1")


@pytest.mark.parametrize("kind", OUTAGES)
def test_after_an_outage_a_lease_has_its_full_time_again(desk: Desk, kind: str) -> None:
    desk.outage(kind)
    assert desk.reaper.reap() == []
    assert desk.left_s() == pytest.approx(60, abs=5)
    assert desk.worker.renew(60).unbroken
    assert desk.status is Status.RUNNING and not desk.client.hexists(keys.JOB + desk.job.id, "deaths")


@pytest.mark.parametrize("kind", OUTAGES)
def test_a_worker_that_died_in_an_outage_is_taken_back_after_that(desk: Desk, kind: str) -> None:
    desk.outage(kind)
    desk.reaper.reap()
    lapse(desk.client, "w1")
    assert desk.reaper.reap() == [MODEL]


def test_one_outage_after_another_gives_a_dead_worker_no_further_time(desk: Desk) -> None:
    desk.outage(OUTAGES[0])
    desk.reaper.reap()
    desk.outage(OUTAGES[1])
    assert desk.reaper.reap() == [MODEL]


@pytest.mark.parametrize("kind", OUTAGES)
def test_a_worker_that_renews_between_two_outages_outlasts_both(desk: Desk, kind: str) -> None:
    for _ in range(3):
        desk.outage(kind)
        assert desk.reaper.reap() == []
        desk.worker.renew(60)
    assert desk.status is Status.RUNNING


def test_every_process_may_pass_by_after_an_outage(desk: Desk) -> None:
    desk.outage(OUTAGES[0])
    assert [reap(desk.client) for _ in range(3)] == [[], [], []]
    assert desk.status is Status.RUNNING


def test_passes_close_to_each_other_write_nothing(desk: Desk) -> None:
    before = desk.passed_at()
    reap(desk.client)
    assert desk.passed_at() == before


def test_the_clock_may_be_set_back(desk: Desk) -> None:
    desk.client.hset(keys.PASSED, "at", desk.passed_at() + 3600)
    desk.reaper.reap()
    desk.worker.renew(60)
    desk.outage(OUTAGES[1])
    assert desk.reaper.reap() == []


def test_the_jobs_of_a_dead_worker_do_not_wait_for_a_clock_that_was_set_back(desk: Desk) -> None:
    hour = desk.passed_at() + 3600
    desk.client.zadd(keys.LEASES, {"w1": hour})
    desk.client.hset(keys.EXTENSIONS, "w1", 0.1)
    desk.client.hset(keys.PASSED, "at", hour)
    eventually(desk.reaper.reap, "its lease lapses by the new clock")
    assert desk.status is Status.QUEUED


def test_the_next_pass_is_due_when_a_lease_may_lapse(desk: Desk) -> None:
    assert desk.reaper.rest_s == REAP_S
    desk.worker.renew(0.3)
    desk.reaper.reap()
    assert 0.05 <= desk.reaper.rest_s < 0.35
    desk.worker.renew(0.001)
    desk.reaper.reap()
    assert 0.05 <= desk.reaper.rest_s <= REAP_S
    desk.worker.retire()
    desk.reaper.reap()
    assert desk.reaper.rest_s == REAP_S


def test_a_pass_notes_how_much_memory_the_server_has(valkey_client: Redis) -> None:
    reap(valkey_client)
    noted = valkey_client.hgetall(keys.MEMORY)
    assert int(noted["used"]) > 0 and int(noted["system"]) > int(noted["used"]) and noted["max"] == "0"


# What becomes of the jobs


def test_what_a_dead_worker_held_waits_again_in_its_old_order(desk: Desk) -> None:
    waiting = submit(desk.jobs)
    urgent = submit(desk.jobs, priority=Priority.HIGH)
    behind = submit(desk.jobs)
    assert [each.job.id for each in reserved(desk.worker, 2)] == [urgent.id, waiting.id]
    lapse(desk.client, "w1")
    desk.reaper.reap()
    other = lease(desk.client, "w2")
    assert [each.job.id for each in reserved(other, 9)] == [urgent.id, desk.job.id, waiting.id, behind.id]


def test_a_reservation_that_is_lost_costs_neither_attempt_nor_blame(desk: Desk) -> None:
    waiting = submit(desk.jobs)
    taken(desk.worker)
    lapse(desk.client, "w1")
    desk.reaper.reap()
    job = desk.get(waiting)
    assert (job.attempt, job.history) == (0, ())
    assert not desk.client.hexists(keys.JOB + waiting.id, "deaths")
    assert [event.kind for event in JobLog(desk.client).read(waiting.id)] == [EventKind.QUEUED]


def test_a_job_that_is_to_blame_fails_and_states_when_its_workers_died(client: Redis, settings: Settings) -> None:
    jobs, log = Jobs(client, settings), JobLog(client)
    job = submit(jobs)
    for attempt in range(1, 5):
        worker = lease(client, f"w{attempt}")
        claimed = started(worker)
        worker.append([row(claimed, claimed.job.last_event + 2, f"{attempt}é ", attempt, attempt)])
        if attempt == 2:
            worker.retire()  # no death
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


def test_a_late_write_of_a_job_that_failed_is_fenced(client: Redis, settings: Settings) -> None:
    jobs = Jobs(client, settings)
    submit(jobs)
    worker = lease(client, "w1")
    claimed = started(worker)
    lapse(client, "w1")
    reap(client, max_deaths=1)
    assert worker.append([row(claimed, 3, "late", 1)]) == [WriteResult.FENCED]
    assert client.hgetall(keys.BYTES).keys() <= {"failed", "failed_limit"}


@pytest.mark.parametrize(("pid", "known"), [(1, 0), (2, 1)])
def test_the_death_of_a_process_does_not_hide_the_one_that_took_its_place(client: Redis, pid: int, known: int) -> None:
    """A process that is started again has the same node name, and its predecessor's lease may lapse later."""
    lease(client, "w1")
    client.set(keys.WORKER + "w1", json.dumps({"id": "w1", "node": "n", "pid": 1}))
    client.set(keys.HOST + "n", json.dumps({"node": "n", "pid": pid}))
    client.zadd(keys.HOSTS, {"n": 1})
    lapse(client, "w1")
    reap(client)
    assert (client.exists(keys.HOST + "n"), client.zcard(keys.HOSTS)) == (known, known)
