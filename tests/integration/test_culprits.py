"""Worker processes that die under their launchers: streams continue soon, and only the job to blame fails."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import psutil
import pytest

from shared.errors import JobFailure
from shared.jobs.record import Job, Status
from shared.redis import keys
from tests.plugins.fleet import SLOW, Fleet, children
from tests.support.farm import MAX_DEATHS
from tests.support.waiting import eventually
from worker.process.breadcrumb import leftovers
from worker.process.exits import EXIT_BROKEN

LAUNCHER = "worker.process.launcher"
MAX_PAUSE_S = 15.0


class Supervisor:
    """Restarts launchers that have ended, as supervisord does."""

    def __init__(self, fleet: Fleet, workers: int, **variables: str) -> None:
        self._fleet = fleet
        self._variables = variables
        self.ended: list[subprocess.Popen[bytes]] = []
        self.processes = [fleet.start(LAUNCHER, **variables) for _ in range(workers)]

    def restart_ended(self) -> None:
        """Restart the launchers that have ended, each with its index."""
        for index, process in enumerate(self.processes):
            if process.poll() is not None:
                self.ended.append(process)
                self.processes[index] = self._fleet.spawn(LAUNCHER, MLXQ_WORKER_INDEX=str(index), **self._variables)

    def deaths(self) -> list[dict[str, Any]]:
        """Return the launchers' reports of deaths."""
        lines = [line for process in self.ended for line in self._fleet.lines(process)]
        return [line for line in lines if line["message"] == "worker_process_died"]


class Pauses:
    """Measures the longest time in which a job wrote no event."""

    def __init__(self, fleet: Fleet, jobs: list[Job]) -> None:
        self._fleet = fleet
        self._jobs = jobs
        now = time.monotonic()
        self._seen = {job.id: ("", now) for job in jobs}
        self.longest_s = 0.0

    def update(self) -> bool:
        """Look at all jobs; return whether one of them still runs."""
        with self._fleet.redis.pipeline(transaction=False) as pipe:
            for job in self._jobs:
                pipe.hmget(keys.JOB + job.id, "seq", "finished_at")
            answers = pipe.execute()
        now = time.monotonic()
        for job, (seq, _) in zip(self._jobs, answers, strict=True):
            last, at = self._seen[job.id]
            if seq != last:
                self.longest_s = max(self.longest_s, now - at)
                self._seen[job.id] = (seq, now)
        return any(finished is None for _, finished in answers)


def kill_child(process: subprocess.Popen[bytes]) -> None:
    [child] = children(process)
    child.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_two_killed_workers_pause_none_of_48_streams_for_long(fleet: Fleet) -> None:
    supervisor = Supervisor(fleet, 2, SLOTS="24", LEASE_S="2")
    jobs = [fleet.submit(f"{SLOW} number {i}", 700) for i in range(48)]
    eventually(lambda: all(fleet.has_tokens(job, 5) for job in jobs), within_s=30)
    pauses = Pauses(fleet, jobs)
    kill_at = {time.monotonic() + 1: supervisor.processes[0], time.monotonic() + 6: supervisor.processes[1]}

    def ended() -> bool:
        for at in [at for at in kill_at if at < time.monotonic()]:
            kill_child(kill_at.pop(at))
        supervisor.restart_ended()
        return not pauses.update()

    eventually(ended, within_s=120)
    assert len(supervisor.ended) == 2
    for job in jobs:
        fleet.check(job)
    assert pauses.longest_s < MAX_PAUSE_S
    assert {fleet.redis.hget(keys.JOB + job.id, "deaths") for job in jobs} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [pytest.param(1, marks=pytest.mark.long), 40])
def test_a_job_that_kills_workers_fails_and_24_others_do_not(fleet: Fleet, die_at: int) -> None:
    supervisor = Supervisor(fleet, 1, SLOTS="32", LEASE_S="2")
    good = [fleet.submit(f"{SLOW} number {i}", 400) for i in range(24)]
    eventually(lambda: all(fleet.has_tokens(job, 3) for job in good), within_s=30)
    bad = fleet.submit(f"!die={die_at}", 400)
    pauses = Pauses(fleet, good)

    def over() -> bool:
        supervisor.restart_ended()
        return not pauses.update() and fleet.get(bad).status.terminal

    eventually(over, within_s=240)
    ended = fleet.get(bad)
    assert (ended.status, ended.error_code) == (Status.FAILED, JobFailure.WORKER_LOST)
    for job in good:
        fleet.check(job)
    deaths = supervisor.deaths()
    assert MAX_DEATHS <= len(deaths) == len(supervisor.ended) <= MAX_DEATHS + 1 + 5
    assert all(line["reported"] and line["exit"] == "status 9" for line in deaths)
    assert [line["failed"] for line in deaths if line["failed"]] == [[bad.id]]
    assert deaths[-1]["suspects"] == [bad.id]
    assert "Last exit: status 9." in str(ended.error_message)


def test_jobs_of_a_dead_worker_return_to_the_queue_before_its_lease_lapses(fleet: Fleet) -> None:
    launcher = fleet.start(LAUNCHER, LEASE_S="60")
    jobs = [fleet.submit(f"{SLOW} {i}", 500) for i in range(3)]
    eventually(lambda: all(fleet.has_tokens(job, 3) for job in jobs))
    kill_child(launcher)
    assert launcher.wait(30) == -signal.SIGKILL
    assert {fleet.get(job).status for job in jobs} == {Status.QUEUED}
    assert fleet.redis.keys(keys.RUNNING + "*") == []
    assert not fleet.redis.exists(keys.LEASES)
    line = fleet.lines(launcher)[-1]
    assert (line["message"], line["exit"], line["phase"]) == ("worker_process_died", "signal 9 (SIGKILL)", "step")
    assert (line["in_flight"], sorted(line["suspects"])) == (3, sorted(job.id for job in jobs))
    assert list(leftovers(fleet.settings.run_dir, "worker-0")) == []


def test_a_process_that_dies_with_its_launcher_is_reported_by_the_next_start(fleet: Fleet) -> None:
    launcher = fleet.start(LAUNCHER, LEASE_S="60")
    job = fleet.submit(SLOW, 300)
    eventually(lambda: fleet.has_tokens(job, 3))
    [child] = children(launcher)
    os.kill(launcher.pid, signal.SIGSTOP)  # so that it cannot report
    child.kill()
    launcher.kill()
    launcher.wait()
    eventually(lambda: list(leftovers(fleet.settings.run_dir, "worker-0")))
    following = fleet.start(LAUNCHER, MLXQ_WORKER_INDEX="0")
    fleet.check(job)
    assert any(line["message"] == "worker_process_died" for line in fleet.lines(following))
    assert int(fleet.redis.hget(keys.JOB + job.id, "suspicion")) == 1
    assert fleet.stop(following) == 0
    assert list(fleet.settings.run_dir.glob("*.breadcrumb")) == []


def test_an_orphan_drains_and_its_successor_waits_for_it(fleet: Fleet) -> None:
    launcher = fleet.start(LAUNCHER, DRAIN_S="2")
    job = fleet.submit(SLOW, 5000)
    eventually(lambda: fleet.has_tokens(job, 3))
    [orphan] = children(launcher)
    launcher.kill()
    launcher.wait()
    following = fleet.spawn(LAUNCHER, MLXQ_WORKER_INDEX="0", DRAIN_S="2")
    eventually(lambda: fleet.card(following), within_s=30)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    eventually(lambda: fleet.get(job).attempt == 2)
    assert fleet.redis.hget(keys.JOB + job.id, "suspicion") is None, "its worker handed it back"
    assert "worker_process_died" not in fleet.output(launcher) + fleet.output(following)


def test_a_signal_to_the_process_group_counts_once(fleet: Fleet) -> None:
    launcher = fleet.start(LAUNCHER, DRAIN_S="20")
    job = fleet.submit(SLOW, 150)
    eventually(lambda: fleet.has_tokens(job, 3))
    for process in (children(launcher)[0], launcher):
        process.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 0
    assert fleet.get(job).status is Status.SUCCEEDED, "it had DRAIN_S to end"


def test_a_job_that_hangs_the_engine_is_suspected_at_once(fleet: Fleet) -> None:
    launcher = fleet.start(LAUNCHER, WATCHDOG_S="0.5", LEASE_S="60")
    job = fleet.submit("!stall=5", 20)
    eventually(lambda: fleet.has_tokens(job, 4))
    assert launcher.wait(30) == EXIT_BROKEN
    assert (fleet.get(job).status, fleet.redis.hget(keys.JOB + job.id, "deaths")) == (Status.QUEUED, "1")
    assert not fleet.redis.exists(keys.LEASES)
    line = fleet.lines(launcher)[-1]
    assert (line["exit"], line["suspects"]) == ("status 70 (it found itself broken)", [job.id])
