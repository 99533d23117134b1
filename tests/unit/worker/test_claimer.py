"""The claimer takes jobs from the queue to the engine. Claimer, engine and publisher are real, and stepped by hand."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from redis import ResponseError

from shared.errors import JobFailure, PromptRefused
from shared.jobs.record import Priority, Status
from shared.models.registry import Registry, WorkerInfo
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.work import undisturbed
from tests.support.queueing import lapse, lease, reserved, row, submission
from tests.support.stepped_worker import SLOTS, SteppedWorker, ids, raising
from worker.queue.claimer import LEASE_WAIT_S, NOT_STARTED, POLL_S
from worker.queue.prepare import TryLater
from worker.runner.fake import FakeRunner


@pytest.fixture
def worker(client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> SteppedWorker:
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)
    monkeypatch.setattr("worker.queue.publisher.sleep", lambda seconds: None)
    return SteppedWorker(client, settings)


# Claims by capacity


def test_jobs_run_to_their_end_with_one_log_line_each(worker: SteppedWorker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker.queue.claimer")
    jobs = [worker.submit() for _ in range(5)]
    worker.finish()
    for job in map(worker.get, jobs):
        assert (job.status, job.finish_reason, job.completion_tokens, job.attempt) == (Status.SUCCEEDED, "length", 4, 1)
        assert worker.jobs.text(job) == undisturbed("hello", 4)
        assert set(job.timings) == {"queue_s", "prefill_s", "first_token_s", "total_s"}
    assert [record.getMessage() for record in caplog.records] == ["job_ended"] * 5
    for job in jobs:
        assert [kind for kind, job_id in worker.recorder.events if job_id == job.id] == ["started", "succeeded"]


def test_it_claims_as_many_jobs_as_can_run_and_one_spare_job(worker: SteppedWorker) -> None:
    jobs = [worker.submit() for _ in range(6)]
    assert worker.claimer.round() == POLL_S
    assert worker.holds() == ids(jobs[: SLOTS + 1])
    assert [worker.is_spare(job) for job in jobs[:4]] == [False, False, True, False]
    assert {worker.get(job).status for job in jobs} == {Status.QUEUED}
    worker.step()
    assert [worker.get(job).status for job in jobs[:3]] == [Status.RUNNING] * 2 + [Status.QUEUED]
    for _ in range(3):
        worker.claimer.round()
    assert worker.holds() == ids(jobs[: SLOTS + 1]), "a full worker claims no more"


def test_it_claims_again_when_a_row_has_ended(worker: SteppedWorker) -> None:
    jobs = [worker.submit() for _ in range(4)]
    worker.claimer.round()
    worker.claimer._wake.clear()
    while jobs[0].id in worker.holds():
        worker.step()
    assert worker.claimer._wake.is_set()
    worker.claimer.round()
    assert jobs[3].id in worker.holds()


def test_a_full_worker_offers_its_waiting_job_to_others(worker: SteppedWorker) -> None:
    jobs = [worker.submit(max_tokens=50) for _ in range(3)]
    worker.claimer.round()
    worker.step()
    client, waiting = worker.client, jobs[2]
    client.hdel(keys.JOB + waiting.id, "spare")  # as if it had been claimed to run at once
    worker.claimer.round()
    assert worker.is_spare(waiting)


def test_a_waiting_job_that_another_worker_took_is_dropped(worker: SteppedWorker) -> None:
    jobs = [worker.submit(max_tokens=50) for _ in range(3)]
    worker.claimer.round()
    worker.step()
    other = lease(worker.client, "w2")
    assert [each.job.id for each in reserved(other, model="fake")] == [jobs[2].id]
    worker.claimer.round()
    worker.step()
    assert worker.holds() == ids(jobs[:2]) and worker.core.waiting() == []
    assert worker.holder(jobs[2]) == "w2"


def test_a_preempted_row_is_not_dropped(worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [worker.submit(max_tokens=50) for _ in range(2)]
    worker.claimer.round()
    worker.step()
    monkeypatch.setattr(worker.core, "waiting", lambda: [jobs[1].id])  # as if it waited for memory
    worker.claimer.round()
    worker.step()
    assert worker.holds() == ids(jobs) and worker.core.slots_used == 2


def test_a_waiting_job_that_is_cancelled_is_dropped(worker: SteppedWorker) -> None:
    jobs = [worker.submit(max_tokens=50) for _ in range(3)]
    worker.claimer.round()
    worker.step()
    assert worker.jobs.stop(jobs[2].id, "a").status is Status.CANCELLED
    worker.claimer.round()
    worker.step()
    assert worker.holds() == ids(jobs[:2])


def test_a_later_job_of_a_higher_class_is_admitted_first(worker: SteppedWorker) -> None:
    batch = [worker.submit(priority=Priority.BATCH) for _ in range(4)]
    worker.claimer.round()
    worker.step()
    urgent = worker.submit(priority=Priority.HIGH)
    seen: list[str] = []
    while len(seen) < 5:
        worker.claimer.round()
        worker.step()
        seen = [job_id for kind, job_id in worker.recorder.events if kind == "started"]
    assert seen.index(urgent.id) <= 3, "after the running jobs and the spare job"
    assert seen[:2] == [job.id for job in batch[:2]]


def test_a_job_that_waits_for_memory_does_not_delay_a_job_of_a_higher_class(worker: SteppedWorker) -> None:
    worker.core.set_cache_limit(1000)
    runs = worker.submit(priority=Priority.BATCH, max_tokens=100)
    worker.claimer.round()
    worker.step()
    large = worker.submit("x" * 850, priority=Priority.BATCH, max_tokens=60)
    worker.claimer.round()
    worker.step()
    urgent, second, last = (worker.submit(priority=each) for each in (Priority.HIGH, Priority.HIGH, Priority.BATCH))
    worker.claimer.round()
    assert worker.holds() == ids([runs, large, urgent])
    worker.step()
    assert [worker.get(job).status for job in (urgent, large)] == [Status.RUNNING, Status.QUEUED]
    worker.finish()
    assert {worker.get(job).status for job in (runs, large, urgent, second, last)} == {Status.SUCCEEDED}


def test_the_next_round_is_due_when_a_deferred_job_may_be_claimed(worker: SteppedWorker) -> None:
    prefix = "1111" + "a" * 12
    other = lease(worker.client, "w2")
    card = WorkerInfo("w2", "node", "h", 1, "fake", "ready", 4, 0, 0.0, 0.0, {}, {})
    Registry(worker.client).announce_worker(card, 60)
    first = worker.submit(prefixes=(prefix,))
    (claimed,) = reserved(other, model="fake")
    other.append([row(claimed, start=True)])
    job = worker.submit(prefixes=(prefix,))
    assert 0 < worker.claimer.round() <= 0.2
    assert not worker.holds()
    worker.client.hincrbyfloat(keys.JOB + job.id, "deferred_at", -0.2)
    assert worker.claimer.round() == POLL_S
    assert worker.holds() == {job.id} and worker.holder(first) == "w2"


# Errors


def test_without_a_lease_the_next_round_is_due_soon(worker: SteppedWorker) -> None:
    worker.submit()
    lapse(worker.client, "w1")
    assert worker.claimer.round() == LEASE_WAIT_S
    worker.claims.renew(60)
    worker.finish()


@pytest.mark.parametrize("error", [RedisAway("away"), ResponseError("BUSY running a script")])
def test_a_claim_is_retried_while_redis_is_unreachable(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = worker.submit()
    with monkeypatch.context() as patch:
        patch.setattr(worker.claims, "claim", raising(error))
        assert worker.claimer.round() == POLL_S
    worker.finish()
    assert worker.get(job).status is Status.SUCCEEDED


def test_a_claim_that_cannot_succeed_ends_the_process(client: Redis, settings: Settings) -> None:
    worker, deaths = SteppedWorker(client, settings), list[str]()
    worker.claimer._on_death = deaths.append
    worker.claims._claim = raising(ResponseError("ERR attempt to index a nil value"))
    worker.claimer.start()
    worker.claimer.join(5)
    assert len(deaths) == 1 and "ResponseError" in deaths[0]


def test_a_prompt_that_does_not_fit_fails_its_job(worker: SteppedWorker) -> None:
    job = worker.submit("x" * 5000)
    other = worker.submit()
    worker.finish()
    failed = worker.get(job)
    assert (failed.status, failed.error_code, failed.attempt) == (Status.FAILED, JobFailure.CONTEXT_LENGTH, 1)
    assert failed.error_message == "The prompt has 5000 tokens."
    assert [event.kind for event in worker.log.read(job.id)] == ["queued", "started", "done"]
    assert worker.get(other).status is Status.SUCCEEDED
    assert ("failed", job.id) in worker.recorder.events


@pytest.mark.parametrize("where", ["prompt", "detokenizer"])
def test_an_unforeseen_error_fails_only_its_job_without_details(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    caplog.set_level(logging.INFO, "worker.queue.claimer")
    make = getattr(FakeRunner, where)
    broken = iter([True])

    def fail_once(*args: Any) -> Any:
        return 1 / 0 if next(broken, False) else make(*args)

    monkeypatch.setattr(FakeRunner, where, fail_once)
    jobs = [worker.submit() for _ in range(2)]
    worker.finish()
    bad, good = map(worker.get, jobs)
    assert (bad.status, bad.error_code, bad.error_message) == (Status.FAILED, JobFailure.ENGINE, NOT_STARTED)
    assert good.status is Status.SUCCEEDED
    ends = [vars(record)["status"] for record in caplog.records if record.message == "job_ended"]
    assert sorted(ends) == ["failed", "succeeded"]


def test_a_cancelled_job_whose_prompt_is_refused_is_not_reported_as_failed(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = worker.submit()

    def refuse(*_: object) -> None:
        worker.jobs.stop(job.id, "a")
        raise PromptRefused(JobFailure.TEMPLATE, "refused")

    monkeypatch.setattr(worker.preparer, "prepare", refuse)
    worker.claimer.round()
    assert (worker.get(job).status, worker.recorder.events, worker.claimer.idle) == (Status.CANCELLED, [], True)


def test_messages_of_a_newer_version_do_not_stop_the_claimer(worker: SteppedWorker) -> None:
    job = worker.submit()
    request = json.loads(worker.client.hget(keys.REQUEST + job.id, "request"))
    request |= {"prompt": None, "messages": [{"role": "assistant", "calls": []}, {"role": "user", "content": [{}]}]}
    worker.client.hset(keys.REQUEST + job.id, "request", json.dumps(request))
    worker.finish()
    assert worker.get(job).status.terminal


def test_a_job_whose_failure_cannot_be_written_is_left_to_the_lease_thread(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = worker.submit("x" * 5000)
    with monkeypatch.context() as patch:
        patch.setattr(worker.claims, "append", raising(RedisAway("away")))
        worker.claimer.round()
    assert worker.claimer.idle and worker.holder(job) == "w1" and worker.get(job).status is Status.QUEUED


def test_a_job_that_cannot_be_prepared_now_returns_to_the_queue(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = worker.submit()
    with monkeypatch.context() as patch:
        patch.setattr(worker.preparer, "prepare", raising(TryLater("the tokenizer is busy")))
        worker.claimer.round()
        worker.claimer.draining = True
        worker.claimer.round()
    assert (worker.holder(job), worker.get(job).attempt, worker.claimer.idle) == ("", 0, True)
    assert worker.recorder.woken == ["fake"]


def count_calls(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    call, moments = getattr(owner, name), list[float]()

    def counted(*args: Any) -> Any:
        moments.append(time.monotonic())
        return call(*args)

    monkeypatch.setattr(owner, name, counted)
    return moments


@pytest.mark.parametrize("missing", [False, True])
def test_a_job_gets_its_images_and_fails_without_them(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    received: list[Mapping[str, bytes]] = []
    prompt = FakeRunner.prompt

    def record_images(runner: FakeRunner, tokens: Any, shared: int, request: Any, images: Mapping[str, bytes]) -> Any:
        received.append(images)
        return prompt(runner, (104, 105), 0, request, {})

    monkeypatch.setattr(FakeRunner, "prompt", record_images)
    worker.images = {"a": b"A"} if missing else {"a": b"A", "b": b"B", "c": b"C"}
    parts = [{"type": "image", "image": name, "width": 1, "height": 1} for name in ("a", "b", "a")]
    submitted = submission(model="fake", max_tokens=2, tokens=(104, 105))
    submitted = replace(
        submitted, request=replace(submitted.request, prompt=None, messages=({"role": "user", "content": parts},))
    )
    job = worker.jobs.create(submitted).job
    monkeypatch.setattr(worker.claimer._pool, "submit", lambda do, claimed: do(claimed))
    worker.finish()
    ended = worker.get(job)
    if missing:
        assert (ended.status, ended.error_code, received) == (Status.FAILED, JobFailure.IMAGE_LOST, [])
    else:
        assert (ended.status, received) == (Status.SUCCEEDED, [{"a": b"A", "b": b"B"}])


def test_jobs_in_preparation_count_as_rows(worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Callable[[], object]] = []
    monkeypatch.setattr(worker.claimer._pool, "submit", lambda do, claimed: prepared.append(lambda: do(claimed)))
    jobs = [worker.submit(known=False) for _ in range(8)]
    worker.claimer.round()
    first = len(worker.holds())
    assert SLOTS <= first <= SLOTS + 1
    for _ in range(3):
        worker.claimer.round()
    assert len(worker.holds()) <= SLOTS + 2, "further rounds claim no more"
    for prepare in prepared:
        prepare()
    worker.step()
    assert worker.core.slots_used == SLOTS
    assert {worker.get(job).status for job in jobs[:SLOTS]} == {Status.RUNNING}


def test_a_job_that_cannot_be_prepared_is_released_after_a_pause(
    worker: SteppedWorker, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    tries: list[None] = []

    def busy(*_: Any) -> Any:
        tries.append(None)
        raise TryLater("the tokenizer is busy")

    monkeypatch.setattr(worker.preparer, "prepare", busy)
    monkeypatch.setattr("worker.queue.claimer.RETRY_S", 0.1)
    worker.submit()
    released = count_calls(worker.claims, "release", monkeypatch)
    worker.claimer.start()
    eventually(lambda: len(released) >= 3)
    worker.claimer.stop()
    assert len(tries) <= len(released) + 1
    assert min(later - sooner for sooner, later in pairwise(released)) > 0.05, "it pauses before each release"
