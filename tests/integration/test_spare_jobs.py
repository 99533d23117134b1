"""Spare jobs, which a worker has claimed and not admitted, stay queued and may move to idle workers."""

from __future__ import annotations

import signal

from shared.jobs.log import EventKind
from shared.jobs.record import AttemptEnd, Job, Priority, Status
from shared.redis import keys
from tests.plugins.fleet import SLOW, Fleet
from tests.support.waiting import eventually

LONG_LEASE = "60"


def reserved(fleet: Fleet) -> set[str]:
    """Return the ids of all jobs that are claimed and not admitted."""
    return {job for name in fleet.redis.keys(keys.RESERVED + "*") for job in fleet.redis.smembers(name)}


def full_worker(fleet: Fleet, **variables: str) -> tuple[list[Job], list[Job]]:
    """Start a worker and fill it; return its running jobs and its spare jobs."""
    fleet.start(SLOTS="8", **variables)
    running = [fleet.submit(f"{SLOW} runs {n}", 600) for n in range(8)]
    eventually(lambda: fleet.held() == 8)
    waiting = [fleet.submit(f"waits {n}", 10) for n in range(3)]
    eventually(lambda: reserved(fleet))
    return running, [job for job in waiting if job.id in reserved(fleet)]


def kinds(fleet: Fleet, job: Job) -> list[str]:
    return [event.kind for event in fleet.log.read(job.id)]


def test_a_spare_job_is_queued_with_its_position_and_can_be_cancelled(fleet: Fleet) -> None:
    running, spare = full_worker(fleet)
    job = fleet.get(spare[0])
    assert (job.status, job.attempt, job.history) == (Status.QUEUED, 0, ())
    assert fleet.jobs.position(job) == 1
    urgent = fleet.submit("urgent", 10, priority=Priority.HIGH)
    assert (fleet.jobs.position(urgent), fleet.jobs.position(job)) == (1, 2)
    fleet.stop_job(spare[0])
    ended = fleet.get(spare[0])
    assert (ended.status, ended.started_at, ended.history) == (Status.CANCELLED, None, ())
    assert kinds(fleet, spare[0]) == [EventKind.QUEUED, EventKind.DONE]
    fleet.stop_job(running[0])
    fleet.check(urgent)
    assert kinds(fleet, spare[0])[-1] == EventKind.DONE


def test_a_spare_job_moves_to_an_idle_worker(fleet: Fleet) -> None:
    running, spare = full_worker(fleet, LEASE_S=LONG_LEASE)
    fleet.start(SLOTS="8", LEASE_S=LONG_LEASE)
    first = {fleet.get(job).history[-1].worker for job in running}
    for job in spare:
        fleet.check(job)
        (attempt,) = fleet.get(job).history
        assert attempt.worker not in first
        assert kinds(fleet, job).count(EventKind.STARTED) == 1
    assert {fleet.get(job).status for job in running} == {Status.RUNNING}


def test_a_death_before_admission_costs_no_attempt(fleet: Fleet) -> None:
    running, spare = full_worker(fleet)
    fleet.processes[0].send_signal(signal.SIGKILL)
    fleet.start(SLOTS="16")
    for job in spare:
        fleet.check(job)
        ended = fleet.get(job)
        assert (ended.attempt, [each.how for each in ended.history]) == (1, [AttemptEnd.ENDED])
        assert [kind for kind in kinds(fleet, job) if kind != EventKind.CHUNK] == [
            EventKind.QUEUED,
            EventKind.STARTED,
            EventKind.DONE,
        ]
        assert not fleet.redis.hget(keys.JOB + job.id, "deaths")
    eventually(lambda: {fleet.get(job).attempt for job in running} == {2}, within_s=20)


def test_a_worker_that_starts_with_a_long_queue_claims_as_soon_as_it_is_ready(fleet: Fleet) -> None:
    jobs = [fleet.submit(f"{n}", 5, wake=False) for n in range(1000)]
    worker = fleet.start(SLOTS="8")
    ready_at = float(fleet.redis.zscore(keys.WORKERS, next(card.id for card in fleet.registry.workers())))
    eventually(lambda: fleet.get(jobs[0]).started_at)
    started_at = fleet.get(jobs[0]).started_at
    assert started_at is not None and started_at < ready_at + 1.0
    eventually(lambda: not fleet.redis.exists(keys.QUEUE + "fake"), within_s=60)
    for job in (jobs[0], jobs[500], jobs[-1]):
        fleet.check(job)
    assert worker.poll() is None
    eventually(lambda: not fleet.held() and not reserved(fleet))
