"""The publisher: everything said is written once, in order, whatever happens to Redis between."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import pytest
from redis import ConnectionError as RedisAway
from redis import OutOfMemoryError, ResponseError

from shared.errors import JobFailure
from shared.jobs.log import JobLog
from shared.jobs.record import Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue.claims import Append, Claims, Verdict
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.plugins.work import run_alone, text_of
from worker.engine.sequence import Outcome, Said, Sequence
from worker.queue.publisher import Publisher
from worker.runner.fake import FakeBackend


class Line:
    """A connection that fails on demand: before the call arrives, or before its answer does."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self.troubles: list[str] = []
        self.calls: list[list[Append]] = []

    def append(self, rows: Rows[Append]) -> list[Verdict]:
        self.calls.append(list(rows))
        trouble = self.troubles.pop(0) if self.troubles else ""
        if trouble == "lost":
            raise RedisAway("lost")
        if trouble == "full":
            raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
        if trouble == "faulty":
            raise ResponseError("ERR user_script:12: attempt to index a nil value")
        verdicts = self._claims.append(rows)
        if trouble == "unanswered":
            raise RedisAway("unanswered")
        return verdicts


class Desk:
    """A publisher that a test drives by hand, jobs for it, and the verdicts it passed on."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.jobs = Jobs(client, settings)
        self.log = JobLog(client)
        self.claims = Claims(client, "w1")
        self.claims.renew(60)
        self.line = Line(self.claims)
        self.heard: list[tuple[str, int, Verdict]] = []
        self.publisher = Publisher(self.line, lambda *word: self.heard.append(word))  # type: ignore[arg-type]
        self.backend = FakeBackend()

    def sequence(self, max_tokens: int = 4) -> Sequence:
        asked = Request("fake", max_tokens, Sampling(0.0), prompt="hello")
        self.jobs.create(Submission(asked, owner="me"))
        job = self.claims.claim("fake")
        assert job is not None
        sequence = Sequence(job, self.backend)
        sequence.begin(self.backend.encode(job.generation, {}))
        return sequence

    def words(self, max_tokens: int = 4) -> list[Said]:
        return run_alone(self.sequence(max_tokens), self.backend)

    def say(self, *words: Said) -> None:
        self.publisher.put(list(words))

    def chunks(self, sequence: Sequence) -> list[str]:
        return [event.text for event in self.log.read(sequence.job.id) if event.text]

    def check(self, words: list[Said]) -> None:
        """The log is what was said, numbered without gaps, with its tokens, and it ended."""
        sequence = words[0].sequence
        events = self.log.read(sequence.job.id)
        assert [event.n for event in events] == list(range(1, len(events) + 1))
        assert "".join(event.text for event in events) == text_of(words)
        assert self.log.written(sequence.job.id).tokens == tuple(sequence.generated)
        assert self.jobs.get(sequence.job.id, "me").status is Status.SUCCEEDED
        assert sequence.outcome is Outcome.ENDED


@pytest.fixture
def desk(client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("worker.queue.publisher.sleep", lambda seconds: None)
    return Desk(client, settings)


def test_a_word_a_write_is_an_event_each(desk: Desk) -> None:
    words = desk.words()
    for word in words:
        desk.say(word)
        desk.publisher.write()
    assert desk.chunks(words[0].sequence) == [word.text for word in words]
    desk.check(words)


def test_what_was_said_between_two_writes_is_one_event_and_one_call_for_all(desk: Desk) -> None:
    one, two = desk.words(), desk.words(max_tokens=2)
    for first, second in zip(one, [*two, None, None], strict=True):
        desk.say(*(word for word in (first, second) if word))
    desk.publisher.write()
    assert len(desk.line.calls) == 1
    assert desk.chunks(one[0].sequence) == [text_of(one)]
    desk.check(one)
    desk.check(two)


@pytest.mark.parametrize("trouble", ["lost", "unanswered", "full"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_broken_write_loses_nothing_and_says_nothing_twice(desk: Desk, trouble: str, at: int) -> None:
    words = desk.words()
    for number, word in enumerate(words):
        if number == at:
            desk.line.troubles = [trouble] * 2
        desk.say(word)
        desk.publisher.write()
    while desk.publisher.backlog:
        desk.publisher.write()
    desk.check(words)


def test_an_unanswered_batch_is_sent_again_as_it_was(desk: Desk) -> None:
    first, *rest = desk.words()
    desk.line.troubles = ["unanswered", "lost"]
    desk.say(first)
    desk.publisher.write()
    for word in rest:
        desk.say(word)
        desk.publisher.write()
    assert desk.line.calls[0] == desk.line.calls[1] == desk.line.calls[2]
    while desk.publisher.backlog:
        desk.publisher.write()
    assert desk.chunks(first.sequence) == [first.text, text_of(rest)]


def test_a_stop_word_is_passed_on(desk: Desk) -> None:
    first, *_ = desk.words()
    job = first.sequence.job
    desk.jobs.stop(job.id, "me")
    desk.say(first)
    desk.publisher.write()
    assert desk.heard == [(job.id, 1, Verdict.CANCELLED)]
    assert first.sequence.outcome is None


def test_a_fenced_job_is_dropped_and_its_neighbour_is_not(desk: Desk) -> None:
    ours, taken = desk.words(), desk.words()
    job = taken[0].sequence.job
    desk.claims.release([(job.id, job.attempt)])
    desk.say(taken[0], *ours)
    desk.publisher.write()
    desk.say(taken[1])
    desk.publisher.write()
    assert taken[0].sequence.outcome is Outcome.FENCED
    assert desk.heard == [(job.id, 1, Verdict.FENCED)]
    assert len(desk.line.calls) == 1
    desk.check(ours)


def test_a_job_is_handed_back_only_when_what_it_said_is_written(desk: Desk) -> None:
    first, *_ = desk.words()
    desk.line.troubles = ["lost"]
    desk.say(first, first.sequence.hand_back())
    outcomes = []
    for _ in range(2):
        desk.publisher.write()
        outcomes.append(first.sequence.outcome)
    assert outcomes == [None, Outcome.HANDED_BACK]
    assert desk.chunks(first.sequence) == [first.text]


def test_closed_it_ends_when_all_is_written(desk: Desk) -> None:
    words = desk.words()
    desk.line.troubles = ["lost", "unanswered"]
    desk.say(*words)
    desk.publisher.close()
    desk.publisher.start()
    desk.publisher.join(5)
    assert not desk.publisher.is_alive()
    desk.check(words)


def test_a_fault_that_no_repetition_heals_ends_the_process(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    deaths: list[str] = []
    publisher = Publisher(desk.line, lambda *_: None, deaths.append)  # type: ignore[arg-type]
    desk.line.troubles = ["faulty"]
    publisher.put(desk.words())
    publisher.start()
    publisher.join(5)
    assert deaths == ["its publisher thread died (ResponseError)"]
    assert "user_script" in caplog.text and len(desk.line.calls) == 1


def test_who_says_his_last_after_the_end_does_not_wait_for_it_to_be_written(desk: Desk) -> None:
    early, late = (desk.sequence() for _ in range(2))
    desk.say(early.fail(JobFailure.TEMPLATE, "No."))
    desk.publisher.close()
    desk.publisher.work()
    desk.say(late.fail(JobFailure.TEMPLATE, "No."))
    assert (early.outcome, late.outcome) == (Outcome.ENDED, Outcome.HANDED_BACK)
    assert desk.jobs.get(late.job.id, "me").status is Status.RUNNING, "for the lease's end to hand it on"
