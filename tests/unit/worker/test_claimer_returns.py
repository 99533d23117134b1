"""Jobs that the claimer continues, returns to the queue or claims again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from redis import ConnectionError as RedisAway

from shared.errors import JobFailure
from shared.jobs.record import Job, Status
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.work import undisturbed
from tests.support.queueing import lapse, lease, reap, reserved, row
from tests.support.stepped_worker import SteppedWorker, ids, raising
from worker.queue.claimer import POLL_S


@pytest.fixture
def worker(client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> SteppedWorker:
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)
    monkeypatch.setattr("worker.queue.publisher.sleep", lambda seconds: None)
    return SteppedWorker(client, settings)


def continued(worker: SteppedWorker, *tokens: int, text: str) -> Job:
    """Return a job that another worker began and handed back."""
    job = worker.submit(max_tokens=6)
    other = lease(worker.client, "w2")
    (claimed,) = reserved(other, model="fake")
    other.append([row(claimed, start=True), row(claimed, 3, text, *tokens)])
    other.retire()
    return job


def test_a_retry_continues_the_written_text(worker: SteppedWorker) -> None:
    whole = worker.submit(max_tokens=6)
    worker.finish()
    (chunks,) = [[event for event in worker.log.read(whole.id) if event.text]]
    job = continued(worker, *chunks[0].tokens, text=chunks[0].text)
    worker.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    worker.finish()
    ended = worker.get(job)
    assert (ended.status, ended.attempt, ended.completion_tokens) == (Status.SUCCEEDED, 2, 6)
    assert (
        "".join(event.text for event in worker.log.read(job.id)) == worker.jobs.text(ended) == undisturbed("hello", 6)
    )


@pytest.mark.parametrize("missing", [("1-0",), ("3-0",), ("4-0",), ("1-0", "2-0", "3-0", "4-0")])
def test_a_job_whose_log_has_a_gap_is_not_continued(worker: SteppedWorker, missing: tuple[str, ...]) -> None:
    job = continued(worker, 300, 301, text="one two")
    worker.client.xdel(keys.LOG + job.id, *missing)
    worker.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    worker.finish()
    ended = worker.get(job)
    assert (ended.status, ended.error_code, ended.attempt) == (Status.FAILED, JobFailure.LOG_LOST, 2)


def test_a_job_whose_log_cannot_be_read_now_returns_to_the_queue(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = continued(worker, 300, text="one")
    worker.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(worker.log, "written", raising(RedisAway("away")))
        worker.claimer.round()
    worker.claimer.draining = True
    worker.claimer.round()
    assert (worker.holder(job), worker.get(job).attempt) == ("", 1)


def test_a_draining_worker_claims_nothing_and_releases_its_waiting_jobs(worker: SteppedWorker) -> None:
    jobs = [worker.submit(max_tokens=50) for _ in range(3)]
    worker.claimer.round()
    worker.step()
    late = worker.submit()
    worker.claimer.draining = True
    worker.core.drain(60)
    worker.step()
    worker.claimer.round()
    assert worker.holds() == ids(jobs[:2])
    assert (worker.holder(jobs[2]), worker.holder(late)) == ("", "")
    assert worker.recorder.woken == ["fake"]
    other = lease(worker.client, "w2")
    assert {each.job.id for each in reserved(other, 9, model="fake")} == {jobs[2].id, late.id}


def test_a_job_that_runs_when_the_drain_ends_is_handed_back_with_its_text(worker: SteppedWorker) -> None:
    job = worker.submit(max_tokens=50)
    worker.claimer.round()
    worker.step(3)
    worker.claimer.draining = True
    worker.core.drain(0)
    worker.step()
    worker.claimer.round()
    waiting = worker.get(job)
    assert (waiting.status, waiting.attempt, worker.claimer.idle) == (Status.QUEUED, 1, True)
    assert undisturbed("hello", 50).startswith(worker.jobs.text(waiting)) and worker.jobs.text(waiting)
    assert ("retried", job.id) in worker.recorder.events


def test_a_failed_release_is_retried(worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = worker.submit(max_tokens=50)
    worker.claimer.round()
    worker.step()
    worker.claimer.draining = True
    worker.core.drain(0)
    worker.step()
    with monkeypatch.context() as patch:
        patch.setattr(worker.claims, "release", raising(RedisAway("away")))
        assert worker.claimer.round() == POLL_S
    assert not worker.claimer.idle and worker.holder(job) == "w1"
    worker.claimer.round()
    assert worker.claimer.idle and worker.holder(job) == ""


def test_a_job_that_is_claimed_during_an_unload_returns_to_the_queue(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = worker.submit()
    claim = worker.claims.claim

    def late(*args: Any) -> Any:
        claimed = claim(*args)
        worker.core.close()
        return claimed

    monkeypatch.setattr(worker.claims, "claim", late)
    worker.claimer.round()
    worker.claimer.draining = True
    worker.claimer.round()
    assert (worker.holder(job), worker.claimer.idle) == ("", True)


def test_a_job_that_lapsed_and_was_claimed_again_here_runs_once(worker: SteppedWorker) -> None:
    job = worker.submit(max_tokens=6)
    worker.claimer.round()
    worker.step(2)
    lapse(worker.client, "w1")
    reap(worker.client)
    worker.claims.renew(60)
    worker.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    worker.finish()
    ended = worker.get(job)
    assert (ended.status, worker.jobs.text(ended)) == (Status.SUCCEEDED, undisturbed("hello", 6))
    assert worker.client.smembers(keys.RUNNING + "w1") == set()


def test_stopping_ends_the_thread(worker: SteppedWorker, eventually: Callable[..., None]) -> None:
    worker.claimer.start()
    job = worker.submit()
    worker.claimer.wake()
    eventually(lambda: worker.holds() == {job.id})
    worker.claimer.stop()
    assert not worker.claimer.is_alive()
