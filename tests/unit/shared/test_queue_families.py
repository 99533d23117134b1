"""Jobs of one request: they are accepted, cancelled and deleted together."""

from __future__ import annotations

import pytest

from shared.errors import Conflict, Invalid, KeyQueueFull, MlxqError, NotFound, QueueFull
from shared.jobs.record import Ending, Job, Status
from shared.jobs.store import Jobs, new_job_id
from shared.queue.claims import Claims, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import MODEL, end, lease, reserved, row, started, submission, submit


@pytest.fixture
def jobs(client: Redis) -> Jobs:
    return Jobs(client, Settings(max_queue=50, max_queue_per_key=50, durable=False))


@pytest.fixture
def worker(client: Redis) -> Claims:
    return lease(client, "w1")


def submit_family(jobs: Jobs, size: int = 3, **options: object) -> tuple[Job, ...]:
    """Submit several jobs with one call; return them, the first first."""
    submissions = [submission(prompt=f"prompt {number}", **options) for number in range(size)]  # type: ignore[arg-type]
    first = jobs.create_all(submissions, [new_job_id() for _ in submissions]).job
    return first, *(jobs.get(child, "a") for child in first.children)


def test_jobs_of_one_request_are_queued_in_order(client: Redis, jobs: Jobs, worker: Claims) -> None:
    family = submit_family(jobs)
    assert [len(job.children) for job in family] == [2, 0, 0]
    claimed = reserved(worker, 3)
    assert [(each.job.id, each.request.prompt) for each in claimed] == [
        (job.id, f"prompt {number}") for number, job in enumerate(family)
    ]
    assert {job.id for job in jobs.recent("a", limit=10)} == {job.id for job in family}
    page = jobs.recent("a", limit=2)
    assert [job.id for job in jobs.recent("a", limit=2, before=page[-1].created_at)] == [family[0].id]


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        ({"max_queue": 4, "max_queue_per_key": 10}, QueueFull),
        ({"max_queue": 10, "max_queue_per_key": 4}, KeyQueueFull),
        ({"queue_bytes": 2**20, "queue_bytes_per_key": 2**20}, Invalid),
    ],
)
def test_all_jobs_of_a_request_are_refused_together(
    client: Redis, limits: dict[str, int], refused: type[MlxqError]
) -> None:
    jobs = Jobs(client, Settings(durable=False, **limits))  # type: ignore[arg-type]
    submit(jobs)
    before = sorted(client.keys())
    tokens = 3000 if refused is Invalid else 10  # one of them would fit
    with pytest.raises(refused):
        submit_family(jobs, 4, max_tokens=tokens)
    assert sorted(client.keys()) == before
    assert client.zcard(keys.QUEUE + MODEL) == 1
    assert len(submit_family(jobs, 2, max_tokens=tokens)) == 2


def test_repeated_request_finds_all_its_jobs(jobs: Jobs) -> None:
    first, *_ = submit_family(jobs, idempotency_key="k", fingerprint="f")
    again, *children = submit_family(jobs, idempotency_key="k", fingerprint="f")
    assert (again.id, again.children) == (first.id, first.children)
    assert [child.id for child in children] == [*first.children]


def test_cancelling_the_first_job_cancels_all(jobs: Jobs, worker: Claims) -> None:
    first, second, third = submit_family(jobs)
    running = started(worker)
    assert running.job.id == first.id
    assert jobs.stop(first.id, "a").status is Status.RUNNING, "its worker stops it"
    assert [jobs.get(job.id, "a").status for job in (second, third)] == [Status.CANCELLED] * 2
    assert worker.append([row(running, ending=Ending(Status.CANCELLED))]) == [WriteResult.CANCELLED]
    assert jobs.stop(first.id, "a").status is Status.CANCELLED


def test_cancelling_a_child_cancels_only_this(jobs: Jobs) -> None:
    first, second, third = submit_family(jobs)
    assert jobs.stop(second.id, "a").status is Status.CANCELLED
    assert {jobs.get(job.id, "a").status for job in (first, third)} == {Status.QUEUED}


def test_children_of_an_ended_job_can_be_cancelled(jobs: Jobs, worker: Claims) -> None:
    first, second = submit_family(jobs, 2)
    end(worker, started(worker))
    assert jobs.stop(first.id, "a").status is Status.SUCCEEDED
    assert jobs.get(second.id, "a").status is Status.CANCELLED


def test_jobs_of_one_request_are_deleted_together(client: Redis, jobs: Jobs, worker: Claims) -> None:
    first, second = submit_family(jobs, 2)
    end(worker, started(worker))
    with pytest.raises(Conflict):
        jobs.forget(first.id, "a")
    jobs.stop(second.id, "a")
    jobs.forget(first.id, "a")
    for job in (first, second):
        with pytest.raises(NotFound):
            jobs.get(job.id, "a")
    assert not client.exists(keys.OWNER + "a")
