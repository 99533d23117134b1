"""When a lease lapses and when it does not: after an outage of Redis nobody is to blame for a renewal that is late."""

from __future__ import annotations

import pytest

from shared.jobs.record import Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue import keys
from shared.queue.claims import REAP_S, Claims, Reaper, Waiting
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.waiting import eventually

OUTAGES = ["another server", "out of reach"]


class Desk:
    """A worker with a running job, and the reaper."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.worker = Claims(client, "w1")
        self.reaper = Reaper(client, 3)
        self.worker.renew(60)
        self.job = self.take()
        self.reaper.reap()

    def take(self) -> Job:
        self.jobs.create(Submission(Request("m", 4, Sampling(0.0), prompt="hi"), owner="me"))
        job = self.worker.claim("m")
        assert job is not None
        return job

    def run_out(self) -> None:
        """The lease has not been renewed in time."""
        self.client.zadd(keys.LEASES, {"w1": 1.0})

    def outage(self, kind: str) -> None:
        """Redis was away, and the lease has run out meanwhile."""
        self.run_out()
        changed = {"server": "before"} if kind == "another server" else {"at": self.passed_at() - 3}
        self.client.hset(keys.PASSED, mapping=changed)

    def passed_at(self) -> float:
        return float(self.client.hget(keys.PASSED, "at"))

    def left_s(self) -> float:
        """What is left of the lease."""
        seconds, micros = self.client.time()
        return float(self.client.zscore(keys.LEASES, "w1")) - seconds - micros / 1e6

    @property
    def status(self) -> Status:
        return self.jobs.get(self.job.id, "me").status


@pytest.fixture
def desk(client: Redis, settings: Settings) -> Desk:
    return Desk(client, settings)


def test_a_lease_that_was_not_renewed_lapses(desk: Desk) -> None:
    desk.run_out()
    assert desk.reaper.reap() == [Waiting("m", desk.job.id)]


@pytest.mark.parametrize("kind", OUTAGES)
def test_after_an_outage_a_lease_has_its_full_time_again(desk: Desk, kind: str) -> None:
    desk.outage(kind)
    assert desk.reaper.reap() == []
    assert desk.left_s() == pytest.approx(60, abs=5)
    assert desk.worker.renew(60).unbroken
    assert (desk.status, desk.client.hget(keys.JOB + desk.job.id, "losses")) == (Status.RUNNING, "0")


@pytest.mark.parametrize("kind", OUTAGES)
def test_who_died_in_an_outage_is_taken_back_after_that(desk: Desk, kind: str) -> None:
    desk.outage(kind)
    desk.reaper.reap()
    desk.run_out()
    assert desk.reaper.reap() == [Waiting("m", desk.job.id)]


def test_outages_one_after_another_give_a_dead_worker_no_further_time(desk: Desk) -> None:
    desk.outage(OUTAGES[0])
    desk.reaper.reap()
    desk.outage(OUTAGES[1])
    assert desk.reaper.reap() == [Waiting("m", desk.job.id)]


@pytest.mark.parametrize("kind", OUTAGES)
def test_who_renews_between_two_outages_outlasts_both(desk: Desk, kind: str) -> None:
    for _ in range(3):
        desk.outage(kind)
        assert desk.reaper.reap() == []
        desk.worker.renew(60)
    assert desk.status is Status.RUNNING


def test_every_process_may_pass_by_after_an_outage(desk: Desk) -> None:
    desk.outage(OUTAGES[0])
    assert [Reaper(desk.client, 3).reap() for _ in range(3)] == [[], [], []]
    assert desk.status is Status.RUNNING


def test_passes_close_to_each_other_write_nothing(desk: Desk) -> None:
    before = desk.passed_at()
    Reaper(desk.client, 3).reap()
    assert desk.passed_at() == before


def test_the_clock_may_be_set_back(desk: Desk) -> None:
    desk.client.hset(keys.PASSED, "at", desk.passed_at() + 3600)
    desk.reaper.reap()
    desk.worker.renew(60)
    desk.outage(OUTAGES[1])
    assert desk.reaper.reap() == []


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


@pytest.mark.parametrize(("counts", "losses"), [(None, "0"), (3, "1")])
def test_a_worker_that_leaves_takes_the_blame_or_not(desk: Desk, counts: int | None, losses: str) -> None:
    assert desk.worker.retire(max_attempts=counts) == [Waiting("m", desk.job.id)]
    assert desk.client.hget(keys.JOB + desk.job.id, "losses") == losses
    assert not desk.client.exists(keys.GRACE, keys.LEASES, keys.RUNNING + "w1")


def test_a_dead_workers_jobs_do_not_wait_for_the_clock_that_was_set_back(desk: Desk) -> None:
    hour = desk.passed_at() + 3600
    desk.client.zadd(keys.LEASES, {"w1": hour})
    desk.client.hset(keys.GRACE, "w1", 0.1)
    desk.client.hset(keys.PASSED, "at", hour)
    eventually(desk.reaper.reap, "its lease lapses by the new clock")
    assert desk.jobs.get(desk.job.id, "me").status is Status.QUEUED
