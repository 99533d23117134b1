"""The claimer: from the queue to the engine, with engine and publisher as they are, one step after another."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from redis import ResponseError

from shared.errors import JobFailure, PromptRefused
from shared.jobs.log import JobLog
from shared.jobs.record import Ending, Job, Priority, Status
from shared.jobs.store import Jobs
from shared.models.registry import Registry, WorkerInfo
from shared.queue import keys
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.plugins.work import undisturbed
from tests.support.queueing import lapse, lease, reap, reserved, row, submission, submit
from worker.engine.core import EngineCore
from worker.queue.claimer import LEASE_WAIT_S, LOOK_S, NOT_STARTED, Claimer
from worker.queue.prepare import Preparer, TryLater
from worker.queue.publisher import Publisher
from worker.runner.fake import FakeRunner

SLOTS = 2


class Recorder:
    """Stands in for the notifier and for task events: notes what it is told."""

    def __init__(self) -> None:
        self.woken: list[str] = []
        self.events: list[tuple[str, str]] = []

    def wake(self, models: Iterable[str]) -> None:
        self.woken += models

    def started(self, job: Job) -> None:
        self.events.append(("started", job.id))

    def retried(self, job: Job) -> None:
        self.events.append(("retried", job.id))

    def ended(self, job: Job, ending: Ending) -> None:
        self.events.append((ending.status.value, job.id))


class Desk:
    """A model worker without threads: `round` claims, `step` runs the engine and writes what it gave."""

    def __init__(self, client: Redis, settings: Settings, slots: int = SLOTS) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.log = JobLog(client)
        self.claims = lease(client, "w1")
        self.recorder = Recorder()
        self.images: dict[str, bytes] = {}
        self.publisher = Publisher(
            self.claims,
            lambda *write_result: self.core.apply_write_result(*write_result),  # noqa: PLW0108 - the core is made after it
            on_started=self.recorder.started,
        )
        self.core = EngineCore(FakeRunner, slots, self.publisher.put)
        self.core.load()
        self.preparer = Preparer(None, tuple, self.find_images, self.log)  # type: ignore[arg-type]  # tokenizes nothing
        self.claimer = Claimer(
            "fake", self.core, self.claims, self.preparer, self.publisher.put,
            self.recorder, self.recorder, slots, lambda: ("w1", "w1-of-another-model"),  # type: ignore[arg-type]
        )  # fmt: skip

    def find_images(self, _job_id: str, digests: Iterable[str]) -> Mapping[str, bytes]:
        return {digest: self.images[digest] for digest in digests if digest in self.images}

    def submit(self, prompt: str = "hello", *, known: bool = True, **more: Any) -> Job:
        """A job; where its tokens are known, the claimer prepares it itself."""
        tokens = tuple(prompt.encode()) if known else None
        return submit(self.jobs, model="fake", prompt=prompt, tokens=tokens, **{"max_tokens": 4} | more)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.core.step()
            self.publisher.write()

    def finish(self) -> None:
        """Run until nothing is left."""
        for _ in range(200):
            self.claimer.round()
            if self.claimer.idle:
                return
            self.step()
        pytest.fail("it does not end")

    def get(self, job: Job) -> Job:
        return self.jobs.get(job.id, "a")

    def holder(self, job: Job) -> str:
        return str(self.client.hget(keys.JOB + job.id, "worker"))

    def is_spare(self, job: Job) -> bool:
        return bool(self.client.hexists(keys.JOB + job.id, "spare"))

    def holds(self) -> set[str]:
        return set(self.claimer.held)


@pytest.fixture
def desk(client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("worker.runner.fake.sleep", lambda seconds: None)
    monkeypatch.setattr("worker.queue.publisher.sleep", lambda seconds: None)
    return Desk(client, settings)


def ids(jobs: Iterable[Job]) -> set[str]:
    return {job.id for job in jobs}


# Claims by capacity


def test_jobs_run_to_their_end_and_leave_one_line_each(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker.queue.claimer")
    jobs = [desk.submit() for _ in range(5)]
    desk.finish()
    for job in map(desk.get, jobs):
        assert (job.status, job.finish_reason, job.completion_tokens, job.attempt) == (Status.SUCCEEDED, "length", 4, 1)
        assert desk.jobs.text(job) == undisturbed("hello", 4)
        assert set(job.timings) == {"queue_s", "prefill_s", "first_token_s", "total_s"}
    assert [record.getMessage() for record in caplog.records] == ["job_ended"] * 5
    for job in jobs:
        assert [kind for kind, job_id in desk.recorder.events if job_id == job.id] == ["started", "succeeded"]


def test_it_claims_what_can_run_and_one_to_have_at_hand(desk: Desk) -> None:
    jobs = [desk.submit() for _ in range(6)]
    assert desk.claimer.round() == LOOK_S
    assert desk.holds() == ids(jobs[: SLOTS + 1])
    assert [desk.is_spare(job) for job in jobs[:4]] == [False, False, True, False]
    assert {desk.get(job).status for job in jobs} == {Status.QUEUED}
    desk.step()
    assert [desk.get(job).status for job in jobs[:3]] == [Status.RUNNING] * 2 + [Status.QUEUED]
    for _ in range(3):
        desk.claimer.round()
    assert desk.holds() == ids(jobs[: SLOTS + 1]), "a full worker claims no more"


def test_it_claims_again_when_a_row_has_ended(desk: Desk) -> None:
    jobs = [desk.submit() for _ in range(4)]
    desk.claimer.round()
    desk.claimer._wake.clear()
    while jobs[0].id in desk.holds():
        desk.step()
    assert desk.claimer._wake.is_set()
    desk.claimer.round()
    assert jobs[3].id in desk.holds()


def test_what_waits_is_offered_to_others_only_while_the_worker_is_full(desk: Desk) -> None:
    jobs = [desk.submit(max_tokens=50) for _ in range(3)]
    desk.claimer.round()
    desk.step()
    client, waiting = desk.client, jobs[2]
    client.hdel(keys.JOB + waiting.id, "spare")  # as if it had been claimed to be run at once
    desk.claimer.round()
    assert desk.is_spare(waiting)


def test_a_job_that_another_worker_took_is_dropped(desk: Desk) -> None:
    jobs = [desk.submit(max_tokens=50) for _ in range(3)]
    desk.claimer.round()
    desk.step()
    other = lease(desk.client, "w2")
    assert [each.job.id for each in reserved(other, model="fake")] == [jobs[2].id]
    desk.claimer.round()
    desk.step()
    assert desk.holds() == ids(jobs[:2]) and desk.core.waiting() == []
    assert desk.holder(jobs[2]) == "w2"


def test_a_preempted_row_is_not_dropped(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [desk.submit(max_tokens=50) for _ in range(2)]
    desk.claimer.round()
    desk.step()
    monkeypatch.setattr(desk.core, "waiting", lambda: [jobs[1].id])  # it waits for memory
    desk.claimer.round()
    desk.step()
    assert desk.holds() == ids(jobs) and desk.core.slots_used == 2


def test_a_cancelled_job_that_waits_here_is_dropped(desk: Desk) -> None:
    jobs = [desk.submit(max_tokens=50) for _ in range(3)]
    desk.claimer.round()
    desk.step()
    assert desk.jobs.stop(jobs[2].id, "a").status is Status.CANCELLED
    desk.claimer.round()
    desk.step()
    assert desk.holds() == ids(jobs[:2])


def test_a_job_of_a_higher_class_that_comes_later_is_admitted_first(desk: Desk) -> None:
    batch = [desk.submit(priority=Priority.BATCH) for _ in range(4)]
    desk.claimer.round()
    desk.step()
    urgent = desk.submit(priority=Priority.HIGH)
    seen: list[str] = []
    while len(seen) < 5:
        desk.claimer.round()
        desk.step()
        seen = [job_id for kind, job_id in desk.recorder.events if kind == "started"]
    assert seen.index(urgent.id) <= 3, "after those that ran, and the one that was at hand"
    assert seen[:2] == [job.id for job in batch[:2]]


def test_a_large_job_that_waits_for_memory_holds_no_job_of_a_higher_class_up(desk: Desk) -> None:
    desk.core.grant(1000)
    runs = desk.submit(priority=Priority.BATCH, max_tokens=100)
    desk.claimer.round()
    desk.step()
    large = desk.submit("x" * 850, priority=Priority.BATCH, max_tokens=60)
    desk.claimer.round()
    desk.step()
    urgent, next_one, behind = (desk.submit(priority=each) for each in (Priority.HIGH, Priority.HIGH, Priority.BATCH))
    desk.claimer.round()
    assert desk.holds() == ids([runs, large, urgent])
    desk.step()
    assert [desk.get(job).status for job in (urgent, large)] == [Status.RUNNING, Status.QUEUED]
    desk.finish()
    assert {desk.get(job).status for job in (runs, large, urgent, next_one, behind)} == {Status.SUCCEEDED}


def test_it_looks_again_when_a_deferred_job_may_be_claimed(desk: Desk) -> None:
    prefix = "1111" + "a" * 12
    other = lease(desk.client, "w2")
    card = WorkerInfo("w2", "node", "h", 1, "fake", "ready", 4, 0, 0.0, 0.0, {}, {})
    Registry(desk.client).announce_worker(card, 60)
    first = desk.submit(prefixes=(prefix,))
    (claimed,) = reserved(other, model="fake")
    other.append([row(claimed, start=True)])
    job = desk.submit(prefixes=(prefix,))
    assert 0 < desk.claimer.round() <= 0.2
    assert not desk.holds()
    desk.client.hincrbyfloat(keys.JOB + job.id, "deferred_at", -0.2)
    assert desk.claimer.round() == LOOK_S
    assert desk.holds() == {job.id} and desk.holder(first) == "w2"


# What goes wrong


def test_without_a_lease_it_looks_again_soon(desk: Desk) -> None:
    desk.submit()
    lapse(desk.client, "w1")
    assert desk.claimer.round() == LEASE_WAIT_S
    desk.claims.renew(60)
    desk.finish()


@pytest.mark.parametrize("error", [RedisAway("away"), ResponseError("BUSY running a script")])
def test_redis_away_at_the_claim_is_waited_out(desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    job = desk.submit()
    with monkeypatch.context() as patch:
        patch.setattr(desk.claims, "claim", raising(error))
        assert desk.claimer.round() == LOOK_S
    desk.finish()
    assert desk.get(job).status is Status.SUCCEEDED


def test_a_claim_that_is_at_fault_ends_the_process(client: Redis, settings: Settings) -> None:
    desk, deaths = Desk(client, settings), list[str]()
    desk.claimer._on_death = deaths.append
    desk.claims._claim = raising(ResponseError("ERR attempt to index a nil value"))
    desk.claimer.start()
    desk.claimer.join(5)
    assert len(deaths) == 1 and "ResponseError" in deaths[0]


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_a_prompt_that_does_not_fit_fails_its_job(desk: Desk) -> None:
    job = desk.submit("x" * 5000)
    neighbour = desk.submit()
    desk.finish()
    failed = desk.get(job)
    assert (failed.status, failed.error_code, failed.attempt) == (Status.FAILED, JobFailure.CONTEXT_LENGTH, 1)
    assert failed.error_message == "The prompt has 5000 tokens."
    assert [event.kind for event in desk.log.read(job.id)] == ["queued", "started", "done"]
    assert desk.get(neighbour).status is Status.SUCCEEDED
    assert ("failed", job.id) in desk.recorder.events


@pytest.mark.parametrize("where", ["prompt", "detokenizer"])
def test_an_unforeseen_error_fails_its_job_alone_and_shows_none_of_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    caplog.set_level(logging.INFO, "worker.queue.claimer")
    make = getattr(FakeRunner, where)
    broken = iter([True])

    def sometimes(*args: Any) -> Any:
        return 1 / 0 if next(broken, False) else make(*args)

    monkeypatch.setattr(FakeRunner, where, sometimes)
    jobs = [desk.submit() for _ in range(2)]
    desk.finish()
    bad, good = map(desk.get, jobs)
    assert (bad.status, bad.error_code, bad.error_message) == (Status.FAILED, JobFailure.ENGINE, NOT_STARTED)
    assert good.status is Status.SUCCEEDED
    ends = [vars(record)["status"] for record in caplog.records if record.message == "job_ended"]
    assert sorted(ends) == ["failed", "succeeded"]


def test_a_job_that_was_cancelled_before_its_prompt_failed_is_not_reported_as_failed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = desk.submit()

    def refuse(*_: object) -> None:
        desk.jobs.stop(job.id, "a")
        raise PromptRefused(JobFailure.TEMPLATE, "refused")

    monkeypatch.setattr(desk.preparer, "prepare", refuse)
    desk.claimer.round()
    assert (desk.get(job).status, desk.recorder.events, desk.claimer.idle) == (Status.CANCELLED, [], True)


def test_messages_of_a_newer_version_do_not_end_the_claimer(desk: Desk) -> None:
    job = desk.submit()
    request = json.loads(desk.client.hget(keys.REQUEST + job.id, "request"))
    request |= {"prompt": None, "messages": [{"role": "assistant", "calls": []}, {"role": "user", "content": [{}]}]}
    desk.client.hset(keys.REQUEST + job.id, "request", json.dumps(request))
    desk.finish()
    assert desk.get(job).status.terminal


def test_a_job_whose_failure_cannot_be_written_is_left_to_the_lease_keeper(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = desk.submit("x" * 5000)
    with monkeypatch.context() as patch:
        patch.setattr(desk.claims, "append", raising(RedisAway("away")))
        desk.claimer.round()
    assert desk.claimer.idle and desk.holder(job) == "w1" and desk.get(job).status is Status.QUEUED


def test_a_job_that_cannot_be_prepared_now_returns_to_the_queue(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job = desk.submit()
    with monkeypatch.context() as patch:
        patch.setattr(desk.preparer, "prepare", raising(TryLater("the tokenizer is busy")))
        desk.claimer.round()
        desk.claimer.draining = True
        desk.claimer.round()
    assert (desk.holder(job), desk.get(job).attempt, desk.claimer.idle) == ("", 0, True)
    assert desk.recorder.woken == ["fake"]


def count_calls(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    call, moments = getattr(owner, name), list[float]()

    def counted(*args: Any) -> Any:
        moments.append(time.monotonic())
        return call(*args)

    monkeypatch.setattr(owner, name, counted)
    return moments


@pytest.mark.parametrize("missing", [False, True])
def test_a_job_gets_the_images_it_names_and_fails_without_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    given: list[Mapping[str, bytes]] = []
    prompt = FakeRunner.prompt

    def look(runner: FakeRunner, tokens: Any, shared: int, request: Any, images: Mapping[str, bytes]) -> Any:
        given.append(images)
        return prompt(runner, (104, 105), 0, request, {})

    monkeypatch.setattr(FakeRunner, "prompt", look)
    desk.images = {"a": b"A"} if missing else {"a": b"A", "b": b"B", "c": b"C"}
    parts = [{"type": "image", "image": name, "width": 1, "height": 1} for name in ("a", "b", "a")]
    asked = submission(model="fake", max_tokens=2, tokens=(104, 105))
    asked = replace(asked, request=replace(asked.request, prompt=None, messages=({"role": "user", "content": parts},)))
    job = desk.jobs.create(asked).job
    monkeypatch.setattr(desk.claimer._pool, "submit", lambda do, claimed: do(claimed))
    desk.finish()
    ended = desk.get(job)
    if missing:
        assert (ended.status, ended.error_code, given) == (Status.FAILED, JobFailure.IMAGE_LOST, [])
    else:
        assert (ended.status, given) == (Status.SUCCEEDED, [{"a": b"A", "b": b"B"}])


# Continuing and giving back


def continued(desk: Desk, *tokens: int, text: str) -> Job:
    """A job that another worker began and handed back."""
    job = desk.submit(max_tokens=6)
    other = lease(desk.client, "w2")
    (claimed,) = reserved(other, model="fake")
    other.append([row(claimed, start=True), row(claimed, 3, text, *tokens)])
    other.retire()
    return job


def test_a_retry_continues_what_is_written(desk: Desk) -> None:
    whole = desk.submit(max_tokens=6)
    desk.finish()
    (chunks,) = [[event for event in desk.log.read(whole.id) if event.text]]
    job = continued(desk, *chunks[0].tokens, text=chunks[0].text)
    desk.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    desk.finish()
    ended = desk.get(job)
    assert (ended.status, ended.attempt, ended.completion_tokens) == (Status.SUCCEEDED, 2, 6)
    assert "".join(event.text for event in desk.log.read(job.id)) == desk.jobs.text(ended) == undisturbed("hello", 6)


@pytest.mark.parametrize("missing", [("1-0",), ("3-0",), ("4-0",), ("1-0", "2-0", "3-0", "4-0")])
def test_a_job_whose_log_has_a_gap_is_not_continued(desk: Desk, missing: tuple[str, ...]) -> None:
    job = continued(desk, 300, 301, text="one two")
    desk.client.xdel(keys.LOG + job.id, *missing)
    desk.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    desk.finish()
    ended = desk.get(job)
    assert (ended.status, ended.error_code, ended.attempt) == (Status.FAILED, JobFailure.LOG_LOST, 2)


def test_a_log_that_cannot_be_read_now_returns_the_job(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job = continued(desk, 300, text="one")
    desk.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(desk.log, "written", raising(RedisAway("away")))
        desk.claimer.round()
    desk.claimer.draining = True
    desk.claimer.round()
    assert (desk.holder(job), desk.get(job).attempt) == ("", 1)


def test_a_draining_worker_claims_nothing_and_gives_back_what_it_has_not_begun(desk: Desk) -> None:
    jobs = [desk.submit(max_tokens=50) for _ in range(3)]
    desk.claimer.round()
    desk.step()
    late = desk.submit()
    desk.claimer.draining = True
    desk.core.drain(60)
    desk.step()
    desk.claimer.round()
    assert desk.holds() == ids(jobs[:2])
    assert (desk.holder(jobs[2]), desk.holder(late)) == ("", "")
    assert desk.recorder.woken == ["fake"]
    other = lease(desk.client, "w2")
    assert {each.job.id for each in reserved(other, 9, model="fake")} == {jobs[2].id, late.id}


def test_what_still_runs_when_the_time_is_over_is_handed_back_with_its_text(desk: Desk) -> None:
    job = desk.submit(max_tokens=50)
    desk.claimer.round()
    desk.step(3)
    desk.claimer.draining = True
    desk.core.drain(0)
    desk.step()
    desk.claimer.round()
    waiting = desk.get(job)
    assert (waiting.status, waiting.attempt, desk.claimer.idle) == (Status.QUEUED, 1, True)
    assert undisturbed("hello", 50).startswith(desk.jobs.text(waiting)) and desk.jobs.text(waiting)
    assert ("retried", job.id) in desk.recorder.events


def test_a_release_that_fails_is_tried_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job = desk.submit(max_tokens=50)
    desk.claimer.round()
    desk.step()
    desk.claimer.draining = True
    desk.core.drain(0)
    desk.step()
    with monkeypatch.context() as patch:
        patch.setattr(desk.claims, "release", raising(RedisAway("away")))
        assert desk.claimer.round() == LOOK_S
    assert not desk.claimer.idle and desk.holder(job) == "w1"
    desk.claimer.round()
    assert desk.claimer.idle and desk.holder(job) == ""


def test_a_claim_that_comes_after_the_unloading_returns_to_the_queue(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = desk.submit()
    claim = desk.claims.claim

    def late(*args: Any) -> Any:
        claimed = claim(*args)
        desk.core.close()
        return claimed

    monkeypatch.setattr(desk.claims, "claim", late)
    desk.claimer.round()
    desk.claimer.draining = True
    desk.claimer.round()
    assert (desk.holder(job), desk.claimer.idle) == ("", True)


def test_a_job_that_was_taken_back_and_claimed_again_here_runs_once(desk: Desk) -> None:
    job = desk.submit(max_tokens=6)
    desk.claimer.round()
    desk.step(2)
    lapse(desk.client, "w1")
    reap(desk.client)
    desk.claims.renew(60)
    desk.claimer._pool.submit = lambda do, claimed: do(claimed)  # type: ignore[assignment,method-assign]
    desk.finish()
    ended = desk.get(job)
    assert (ended.status, desk.jobs.text(ended)) == (Status.SUCCEEDED, undisturbed("hello", 6))
    assert desk.client.smembers(keys.RUNNING + "w1") == set()


def test_stopping_ends_the_thread(desk: Desk, eventually: Callable[..., None]) -> None:
    desk.claimer.start()
    job = desk.submit()
    desk.claimer.wake()
    eventually(lambda: desk.holds() == {job.id})
    desk.claimer.stop()
    assert not desk.claimer.is_alive()


def test_jobs_that_are_being_prepared_take_their_rows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Callable[[], object]] = []
    monkeypatch.setattr(desk.claimer._pool, "submit", lambda do, claimed: prepared.append(lambda: do(claimed)))
    jobs = [desk.submit(known=False) for _ in range(8)]
    desk.claimer.round()
    first = len(desk.holds())
    assert SLOTS <= first <= SLOTS + 1
    for _ in range(3):
        desk.claimer.round()
    assert len(desk.holds()) <= SLOTS + 2, "however often it looks"
    for prepare in prepared:
        prepare()
    desk.step()
    assert desk.core.slots_used == SLOTS
    assert {desk.get(job).status for job in jobs[:SLOTS]} == {Status.RUNNING}


def test_what_cannot_be_prepared_is_not_claimed_again_and_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    tries: list[None] = []

    def busy(*_: Any) -> Any:
        tries.append(None)
        raise TryLater("the tokenizer is busy")

    monkeypatch.setattr(desk.preparer, "prepare", busy)
    monkeypatch.setattr("worker.queue.claimer.TRY_AGAIN_S", 0.1)
    desk.submit()
    released = count_calls(desk.claims, "release", monkeypatch)
    desk.claimer.start()
    eventually(lambda: len(released) >= 3)
    desk.claimer.stop()
    assert len(tries) <= len(released) + 1
    assert min(later - sooner for sooner, later in pairwise(released)) > 0.05, "it waits before it tries again"
