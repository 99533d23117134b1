"""The task: from a ticket to a job's end, with the engine and the publisher as they are and no Celery."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from redis import ResponseError

from shared.errors import JobFailure
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Job, Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue.claims import Append, Claims, Left, LeftToOthers, NoLease, Waiting
from shared.queue.redis import Redis
from shared.settings import Settings
from worker.engine.core import Batch
from worker.engine.engine import Engine
from worker.queue.claimer import Runner
from worker.queue.lease import Claim
from worker.queue.left import Caller
from worker.queue.publisher import Publisher
from worker.queue.seats import Seats
from worker.runner.base import Prompt, PromptError
from worker.runner.fake import FakeBackend


class Office:
    """Takes note of tickets."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send_all(self, waiting: list[Waiting]) -> None:
        self.sent += [each.job_id for each in waiting]


class Desk:
    """A runner with all it needs."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.jobs = Jobs(client, settings)
        self.claims = Claims(client, "w1")
        self.log = JobLog(client)
        self.office = Office()
        self.held: set[Claim] = set()
        self.publisher = Publisher(self.claims, lambda *word: self.batch.heed(*word))  # noqa: PLW0108 - a cycle
        self.engine = Engine()
        self.batch = Batch(FakeBackend, 4, self.publisher.put, self.engine.wake)
        self.engine.open(self.batch)
        self.images: dict[str, bytes] = {}
        self.runner = Runner(
            self.batch,
            self.publisher,
            self.claims,
            self.log,
            self.office,  # type: ignore[arg-type]
            self.held,
            self.renew,
            lambda _job_id, digests: {each: self.images[each] for each in digests if each in self.images},
            64,
        )

    def renew(self, seconds: float = 60) -> bool:
        self.claims.renew(60)
        return True

    def submit(self, prompt: str | None = "hello", **more: Any) -> Job:
        asked = Request(**{"model": "fake", "max_tokens": 6, "sampling": Sampling(0.0), "prompt": prompt, **more})
        return self.jobs.create(Submission(asked, owner="me", request_id="req-7"))[0]

    def run(self, job: Job) -> Job:
        self.runner.run("fake", job.id)
        assert not self.held
        return self.jobs.get(job.id, "me")


@pytest.fixture
def desk(client: Redis, settings: Settings) -> Iterator[Desk]:
    desk = Desk(client, settings)
    desk.publisher.start()
    desk.engine.start()
    yield desk
    desk.engine.close()
    desk.publisher.close()
    desk.engine.join(5)
    desk.publisher.join(5)
    assert not desk.publisher.is_alive()


def test_a_job_is_worked_on_and_its_one_line_has_both_ids(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker.queue.claimer")
    job = desk.run(desk.submit())
    assert (job.status, job.finish_reason, job.completion_tokens) == (Status.SUCCEEDED, "length", 6)
    assert job.text == desk.log.written(job.id).text
    assert set(job.timings) == {"queue_s", "prefill_s", "first_token_s", "total_s"}
    assert [record.getMessage() for record in caplog.records] == ["job ended"]


def test_a_retry_that_cannot_be_started_keeps_what_was_written(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job = desk.submit()
    desk.renew()
    claimed = desk.claims.claim("fake")
    assert claimed is not None
    desk.claims.append([Append.of(claimed, claimed.last_event + 1, "of another model", (300, 301))])
    desk.claims.release([(job.id, 1)])
    ended = desk.run(job)
    assert (ended.status, ended.error_code) == (Status.FAILED, JobFailure.ENGINE)
    assert (ended.text, ended.completion_tokens) == ("of another model", 2)


def test_no_lease_yet_is_waited_out(desk: Desk) -> None:
    with pytest.raises(NoLease):
        desk.claims.claim("fake")
    assert desk.run(desk.submit()).status is Status.SUCCEEDED


def test_a_ticket_too_many_changes_nothing(desk: Desk) -> None:
    job = desk.run(desk.submit())
    assert desk.run(job) == job


def test_a_draining_worker_leaves_jobs_alone(desk: Desk) -> None:
    desk.runner.draining = True
    assert desk.run(desk.submit()).status is Status.QUEUED


def test_a_prompt_that_does_not_fit_fails_its_job(desk: Desk) -> None:
    job = desk.run(desk.submit("x" * 5000))
    assert (job.status, job.error_code) == (Status.FAILED, JobFailure.CONTEXT_LENGTH)
    assert job.error_message == "The prompt has 5000 tokens."


def test_an_unforeseen_error_fails_its_job_without_a_word_of_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "encode", lambda *_: 1 / 0)
    job = desk.run(desk.submit())
    assert (job.status, job.error_code) == (Status.FAILED, JobFailure.ENGINE)
    assert job.error_message == "The worker could not start this job."


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("tokeniser"), JobFailure.ENGINE), (PromptError(JobFailure.TEMPLATE, "No."), JobFailure.TEMPLATE)],
)
def test_a_prompt_that_raises_fails_its_job_and_its_neighbours_go_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception, code: JobFailure
) -> None:
    encode = FakeBackend.encode

    def sometimes(backend: FakeBackend, generation: Request, images: Mapping[str, bytes]) -> Prompt:
        if generation.prompt == "bad":
            raise error
        return encode(backend, generation, images)

    monkeypatch.setattr(FakeBackend, "encode", sometimes)
    jobs = [desk.submit(prompt) for prompt in ("!pause=0.02 good", "bad", "!pause=0.02 fine")]
    desk.renew()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda job: desk.runner.run("fake", job.id), jobs))
    good, bad, fine = (desk.jobs.get(job.id, "me") for job in jobs)
    assert (good.status, fine.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    assert (bad.status, bad.error_code, bad.attempt) == (Status.FAILED, code, 1)


def test_a_job_is_given_the_images_it_names_and_fails_without_them(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Mapping[str, bytes]] = []

    def look(_: FakeBackend, __: Request, images: Mapping[str, bytes]) -> Prompt:
        given.append(images)
        return Prompt((104, 105))

    monkeypatch.setattr(FakeBackend, "encode", look)
    parts = [{"type": "text", "text": "hi"}, *({"type": "image", "image": name} for name in ("a", "b", "a"))]
    desk.images = {"a": b"A", "b": b"B", "c": b"C"}
    job = desk.submit(prompt=None, messages=({"role": "user", "content": parts},))
    assert desk.run(job).status is Status.SUCCEEDED
    assert given == [{"a": b"A", "b": b"B"}]
    del desk.images["b"]
    job = desk.run(desk.submit(prompt=None, messages=({"role": "user", "content": parts},)))
    assert (job.status, job.error_code) == (Status.FAILED, JobFailure.IMAGE_LOST)


def test_prompts_are_read_one_at_a_time_and_only_that_one_counts_as_being_read(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, encode, written = desk.runner, FakeBackend.encode, desk.log.written
    turn = threading.Lock()
    read: list[Claim] = []
    while_replaying: list[object] = []

    def alone(backend: FakeBackend, generation: Request, images: Mapping[str, bytes]) -> Prompt:
        assert turn.acquire(blocking=False), "another prompt is being read"
        try:
            assert runner.encoding and runner.encoding[1].generation == generation
            read.append(runner.encoding[0])
            return encode(backend, generation, images)
        finally:
            turn.release()

    def replay(*args: Any) -> Any:
        while_replaying.append(runner.encoding)
        return written(*args)

    desk.renew()
    jobs = [desk.submit(f"!encode=0.02 {i}") for i in range(4)]
    again = desk.claims.claim("fake")
    assert again is not None
    desk.claims.release([(again.id, 1)])
    monkeypatch.setattr(FakeBackend, "encode", alone)
    monkeypatch.setattr(desk.log, "written", replay)
    desk.run(again)
    assert while_replaying == [None], "what waits for Redis is bounded by its timeouts"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda job: runner.run("fake", job.id), jobs[1:]))
    assert {desk.jobs.get(job.id, "me").status for job in jobs} == {Status.SUCCEEDED}
    assert sorted(read) == sorted((job.id, 1 + (job.id == again.id)) for job in jobs)
    assert runner.encoding is None


def test_a_job_that_no_sequence_can_be_made_of_fails(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "detokenizer", lambda _: 1 / 0)
    job = desk.run(desk.submit())
    assert (job.status, job.error_code, job.attempt) == (Status.FAILED, JobFailure.ENGINE, 1)
    assert desk.log.read(job.id)[-1].kind is EventKind.DONE


def test_what_is_handed_back_gets_a_ticket(desk: Desk) -> None:
    desk.batch.drain(0)
    job = desk.run(desk.submit())
    assert (job.status, desk.office.sent) == (Status.QUEUED, [job.id])


def test_a_claim_that_comes_after_the_unloading_is_handed_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def claim_late(model: str, beside: Iterable[str]) -> Job | None:
        job, gone = claim(model, beside), threading.Event()
        desk.engine.shut(desk.batch, gone.set)
        gone.wait(5)
        return job

    claim = desk.claims.claim
    desk.batch.loaded.result(5)
    monkeypatch.setattr(desk.claims, "claim", claim_late)
    desk.renew()
    job = desk.submit()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(desk.runner.run, "fake", job.id).result(5)
    assert desk.jobs.get(job.id, "me").status is Status.QUEUED
    assert desk.office.sent == [job.id]


def test_a_retry_continues_what_is_written(desk: Desk) -> None:
    wanted = desk.run(desk.submit()).text
    job = desk.submit()
    desk.renew()
    claimed = desk.claims.claim("fake")
    assert claimed is not None
    tokens = desk.log.read(desk.run(desk.submit()).id)[2].tokens
    assert wanted is not None
    first_word = wanted[: wanted.index(" ", 1)]
    desk.claims.append([Append.of(claimed, claimed.last_event + 1, first_word, tokens[:1])])
    desk.claims.release([(job.id, 1)])
    again = desk.run(job)
    assert (again.attempt, again.text, again.completion_tokens) == (2, wanted, 6)
    assert "".join(event.text for event in desk.log.read(job.id)) == wanted


def test_a_log_that_cannot_be_read_sends_the_job_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise RedisAway

    job = desk.submit()
    desk.renew()
    desk.claims.claim("fake")
    desk.claims.release([(job.id, 1)])
    monkeypatch.setattr(desk.log, "written", away)
    assert desk.run(job).status is Status.QUEUED


@pytest.mark.parametrize("writes_too", [False, True])
def test_a_log_that_is_at_fault_fails_its_job_or_leaves_it_to_the_lease_keeper(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, writes_too: bool
) -> None:
    def at_fault(*_: object) -> None:
        raise ResponseError("WRONGTYPE")

    job = desk.submit()
    desk.renew()
    desk.claims.claim("fake")
    desk.claims.release([(job.id, 1)])
    monkeypatch.setattr(desk.log, "written", at_fault)
    if writes_too:
        monkeypatch.setattr(desk.claims, "append", at_fault)
        assert desk.run(job).status is Status.RUNNING, "handed back here, it would count as no loss and come again"
    else:
        assert desk.run(job).error_code == JobFailure.ENGINE


@pytest.mark.parametrize("missing", [("1-0",), ("3-0",), ("4-0", "5-0"), ("1-0", "2-0", "3-0", "4-0", "5-0")])
def test_a_job_whose_log_has_a_gap_is_not_continued(desk: Desk, client: Redis, missing: tuple[str, ...]) -> None:
    job = desk.submit()
    desk.renew()
    claimed = desk.claims.claim("fake")
    assert claimed is not None
    rows = [Append.of(claimed, n, f"word {n}", (300 + n,)) for n in (3, 4)]
    desk.claims.append(rows)
    desk.claims.release([(job.id, 1)])
    client.xdel("mlxq:log:" + job.id, *missing)
    ended = desk.run(job)
    assert (ended.status, ended.error_code, ended.attempt) == (Status.FAILED, JobFailure.LOG_LOST, 2)
    assert (ended.text, ended.completion_tokens) == (None, None), "half a text is not given out as the whole"


def test_a_job_that_is_left_to_another_worker_is_told_to_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    left, calls = Left("job", "node", 0.2), []

    def claim(model: str, beside: Iterable[str]) -> None:
        raise LeftToOthers([left])

    monkeypatch.setattr(desk.claims, "claim", claim)
    monkeypatch.setattr(Caller, "call", lambda _, model, jobs: calls.append((model, jobs)))
    assert desk.run(desk.submit()).status is Status.QUEUED
    assert calls == [("fake", (left,))]


def test_redis_away_at_the_claim_ends_the_ticket(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(model: str, beside: Iterable[str]) -> None:
        raise RedisAway

    monkeypatch.setattr(desk.claims, "claim", away)
    assert desk.run(desk.submit()).status is Status.QUEUED


def test_a_claim_that_raises_leaves_its_slot_and_does_what_other_tickets_were_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, raised = desk.claims.claim, 0

    def once(model: str, beside: Iterable[str]) -> Job | None:
        nonlocal raised
        raised += 1
        if raised == 1:
            desk.runner.run("fake", "another")  # a ticket that finds the one slot taken
            raise KeyError("a record of another version")
        return claim(model, beside)

    desk.runner._seats = Seats(1)
    monkeypatch.setattr(desk.claims, "claim", once)
    assert desk.run(desk.submit()).status is Status.SUCCEEDED, "the other ticket's job is done"
    assert desk.runner.idle


def test_a_job_that_another_took_is_let_go(desk: Desk, eventually: Callable[..., None]) -> None:
    other = Claims(desk.jobs._client, "w1")

    def take(job_id: str, attempt: int) -> None:
        other.release([(job_id, attempt)])

    job = desk.submit("!pause=0.05", max_tokens=1000)
    submit = desk.batch.submit

    def submit_and_take(sequence: Any) -> None:
        submit(sequence)
        take(sequence.job.id, sequence.job.attempt)

    desk.batch.submit = submit_and_take  # type: ignore[method-assign]
    assert desk.run(job).status is Status.QUEUED
    eventually(lambda: not desk.batch.busy)
