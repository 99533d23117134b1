"""The publisher: all that rows generate is written once, in order, whatever happens to Redis meanwhile."""

from __future__ import annotations

import json
from collections.abc import Sequence as Rows
from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from redis import OutOfMemoryError, ResponseError

from shared.errors import JobFailure
from shared.jobs.log import EventKind, JobLog
from shared.jobs.record import Status
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.queue.claims import Append, Claims, WriteResult
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.plugins.work import run_alone, sequence_for, text_of
from tests.support.queueing import lease, reserved
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.queue.publisher import Publisher
from worker.runner.base import TokenOutput
from worker.runner.fake import FakeRunner


class Line:
    """A connection that fails on demand: before the call arrives, or before its answer does."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self.troubles: list[str] = []
        self.calls: list[list[Append]] = []

    def append(self, rows: Rows[Append]) -> list[WriteResult]:
        self.calls.append(list(rows))
        trouble = self.troubles.pop(0) if self.troubles else ""
        if trouble == "lost":
            raise RedisAway("lost")
        if trouble == "full":
            raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
        if trouble == "faulty":
            raise ResponseError("ERR user_script:12: attempt to index a nil value")
        results = self._claims.append(rows)
        if trouble == "unanswered":
            raise RedisAway("unanswered")
        return results


class Desk:
    """A publisher that a test drives by hand, jobs for it, and what it passed on."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.log = JobLog(client)
        self.claims = lease(client, "w1")
        self.line = Line(self.claims)
        self.results: list[tuple[str, int, WriteResult]] = []
        self.began: list[str] = []
        self.publisher = Publisher(
            self.line,  # type: ignore[arg-type]
            lambda *write_result: self.results.append(write_result),
            on_started=lambda job: self.began.append(job.id),
        )
        self.runner = FakeRunner()

    def sequence(self, max_tokens: int = 4, **request: Any) -> Sequence:
        asked = Request("fake", max_tokens, Sampling(0.0), prompt="hello", **request)
        self.jobs.create(Submission(asked, owner="me"))
        return self.claim()

    def claim(self) -> Sequence:
        (claimed,) = reserved(self.claims, model="fake")
        return sequence_for(claimed, self.runner)

    def outputs(self, max_tokens: int = 4) -> list[SequenceOutput]:
        """All that a job gives, its start first."""
        sequence = self.sequence(max_tokens)
        return [sequence.start(), *run_alone(sequence, self.runner)]

    def put(self, *outputs: SequenceOutput) -> None:
        self.publisher.put(list(outputs))

    def flush(self) -> None:
        while self.publisher.backlog:
            self.publisher.write()

    def chunks(self, sequence: Sequence) -> list[str]:
        return [event.text for event in self.log.read(sequence.job.id) if event.text]

    def kinds(self, sequence: Sequence) -> list[str]:
        return [str(event.kind) for event in self.log.read(sequence.job.id)]

    def check(self, outputs: list[SequenceOutput]) -> None:
        """The log is what was generated, numbered without gaps, with its tokens, and it ended."""
        sequence = outputs[0].sequence
        events = self.log.read(sequence.job.id)
        assert [event.n for event in events] == list(range(1, len(events) + 1))
        kinds = [event.kind for event in events]
        assert (kinds.count(EventKind.STARTED), kinds.count(EventKind.DONE)) == (1, 1)
        assert "".join(event.text for event in events) == text_of(outputs)
        assert self.log.written(sequence.job.id).tokens == tuple(sequence.generated)
        assert self.jobs.get(sequence.job.id, "me").status is Status.SUCCEEDED
        assert sequence.outcome is Outcome.ENDED


@pytest.fixture
def desk(client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("worker.queue.publisher.sleep", lambda seconds: None)
    return Desk(client, settings)


def test_an_output_per_write_is_an_event_each(desk: Desk) -> None:
    outputs = desk.outputs()
    for output in outputs:
        desk.put(output)
        desk.publisher.write()
    assert desk.chunks(outputs[0].sequence) == [output.text for output in outputs[1:]]
    desk.check(outputs)


def test_admission_is_written_by_itself_and_reported_once(desk: Desk) -> None:
    sequence = desk.sequence()
    desk.line.troubles = ["unanswered", "lost"]
    desk.put(sequence.start())
    desk.publisher.write()
    assert desk.began == []
    desk.flush()
    assert desk.began == [sequence.job.id]
    job = desk.jobs.get(sequence.job.id, "me")
    assert (job.status, job.attempt, desk.kinds(sequence)) == (Status.RUNNING, 1, ["queued", "started"])


def test_outputs_between_two_writes_are_one_event_and_one_call_for_all(desk: Desk) -> None:
    one, two = desk.outputs(), desk.outputs(max_tokens=2)
    for first, second in zip(one, [*two, None, None], strict=True):
        desk.put(*(output for output in (first, second) if output))
    desk.publisher.write()
    assert len(desk.line.calls) == 1
    assert desk.chunks(one[0].sequence) == [text_of(one)]
    desk.check(one)
    desk.check(two)


@pytest.mark.parametrize("trouble", ["lost", "unanswered", "full"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_broken_write_loses_nothing_and_writes_nothing_twice(desk: Desk, trouble: str, at: int) -> None:
    outputs = desk.outputs()
    for number, output in enumerate(outputs):
        if number == at:
            desk.line.troubles = [trouble] * 2
        desk.put(output)
        desk.publisher.write()
    desk.flush()
    desk.check(outputs)


def test_an_unanswered_batch_is_sent_again_as_it_was(desk: Desk) -> None:
    start, first, *rest = desk.outputs()
    desk.line.troubles = ["unanswered", "lost"]
    desk.put(start, first)
    desk.publisher.write()
    for output in rest:
        desk.put(output)
        desk.publisher.write()
    assert desk.line.calls[0] == desk.line.calls[1] == desk.line.calls[2]
    desk.flush()
    assert desk.chunks(first.sequence) == [first.text, text_of(rest)]
    desk.check([start, first, *rest])


def test_a_later_attempt_continues_the_numbers(desk: Desk) -> None:
    start, first, *_ = desk.outputs()
    desk.put(start, first)
    desk.publisher.write()
    desk.claims.release([(first.sequence.job.id, first.sequence.job.claimed_at)])
    second = desk.claim()
    tokens = (TokenOutput(second.uid, 65, text="A"),)
    desk.put(second.start(), SequenceOutput(second, tokens, "A"), second.finish(Status.SUCCEEDED, reason="stop"))
    desk.publisher.write()
    assert desk.kinds(second) == ["queued", "started", "chunk", "queued", "resumed", "chunk", "done"]
    assert [event.n for event in desk.log.read(second.job.id)] == [*range(1, 8)]
    assert desk.jobs.text(desk.jobs.get(second.job.id, "me")) == first.text + "A"


def test_a_prompt_that_the_worker_tokenised_is_stored_with_the_admission(desk: Desk) -> None:
    sequence = desk.sequence()
    sequence.new_tokens = (104, 105)
    desk.put(sequence.start())
    desk.publisher.write()
    desk.claims.release([(sequence.job.id, sequence.job.claimed_at)])
    assert desk.claim().claimed.tokens == (104, 105)


def test_log_probabilities_are_in_the_event_of_their_text(desk: Desk) -> None:
    sequence = desk.sequence(logprobs=1)
    outputs = [sequence.start(), *run_alone(sequence, desk.runner)]
    desk.put(*outputs)
    desk.publisher.write()
    data = json.loads(desk.log.read(sequence.job.id)[2].data)
    assert data["text"] == text_of(outputs)
    expected = [round(output.logprob or 0.0, 6) for each in outputs for output in each.outputs]
    assert [entry["logprob"] for entry in data["logprobs"]] == expected and len(expected) == 4
    assert [len(entry["top"]) for entry in data["logprobs"]] == [1] * 4


def test_a_job_that_did_not_ask_has_no_log_probabilities(desk: Desk) -> None:
    sequence = desk.sequence()
    desk.put(sequence.start(), SequenceOutput(sequence, (TokenOutput(sequence.uid, 65, -0.5),), "A"))
    desk.publisher.write()
    assert json.loads(desk.log.read(sequence.job.id)[-1].data) == {"text": "A"}


def test_a_stop_word_is_passed_on(desk: Desk) -> None:
    start, first, *_ = desk.outputs()
    job = first.sequence.job
    desk.put(start)
    desk.publisher.write()
    desk.jobs.stop(job.id, "me")
    desk.put(first)
    desk.publisher.write()
    assert desk.results == [(job.id, 1, WriteResult.CANCELLED)]
    assert first.sequence.outcome is None


def test_a_job_that_was_cancelled_before_its_admission_is_dropped(desk: Desk) -> None:
    start, *_ = desk.outputs()
    job = start.sequence.job
    desk.jobs.stop(job.id, "me")
    desk.put(start)
    desk.publisher.write()
    assert (start.sequence.outcome, desk.results) == (Outcome.FENCED, [(job.id, 1, WriteResult.FENCED)])
    assert desk.began == [] and desk.kinds(start.sequence) == ["queued", "done"]


def test_a_fenced_job_is_dropped_and_its_neighbour_is_not(desk: Desk) -> None:
    ours, lost = desk.outputs(), desk.outputs()
    job = lost[0].sequence.job
    desk.claims.release([(job.id, job.claimed_at)])
    desk.put(lost[0], *ours)
    desk.publisher.write()
    desk.put(lost[1])
    desk.publisher.write()
    assert lost[0].sequence.outcome is Outcome.FENCED
    assert desk.results == [(job.id, 1, WriteResult.FENCED)]
    assert len(desk.line.calls) == 1
    desk.check(ours)


def test_a_job_is_handed_back_only_when_what_it_generated_is_written(desk: Desk) -> None:
    start, first, *_ = desk.outputs()
    desk.line.troubles = ["lost"]
    desk.put(start, first, first.sequence.hand_back())
    outcomes = []
    for _ in range(2):
        desk.publisher.write()
        outcomes.append(first.sequence.outcome)
    assert outcomes == [None, Outcome.HANDED_BACK]
    assert desk.chunks(first.sequence) == [first.text]


def test_once_closed_it_ends_when_all_is_written(desk: Desk) -> None:
    outputs = desk.outputs()
    desk.line.troubles = ["lost", "unanswered"]
    desk.put(*outputs)
    desk.publisher.close()
    desk.publisher.start()
    desk.publisher.join(5)
    assert not desk.publisher.is_alive()
    desk.check(outputs)


def test_an_error_that_does_not_pass_ends_the_process(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    deaths: list[str] = []
    publisher = Publisher(desk.line, lambda *_: None, deaths.append)  # type: ignore[arg-type]
    desk.line.troubles = ["faulty"]
    publisher.put(desk.outputs())
    publisher.start()
    publisher.join(5)
    assert deaths == ["its publisher thread died (ResponseError)"]
    assert "user_script" in caplog.text and len(desk.line.calls) == 1


def test_what_is_put_after_the_end_is_left_to_another_attempt(desk: Desk) -> None:
    early, late = (desk.sequence() for _ in range(2))
    desk.put(early.fail(JobFailure.TEMPLATE, "No."))
    desk.publisher.close()
    desk.publisher.work()
    desk.put(late.fail(JobFailure.TEMPLATE, "No."))
    assert (early.outcome, late.outcome) == (Outcome.ENDED, Outcome.HANDED_BACK)
    failed = desk.jobs.get(early.job.id, "me")
    assert (failed.status, failed.attempt) == (Status.FAILED, 1)
    assert desk.jobs.get(late.job.id, "me").status is Status.QUEUED


def test_a_job_that_was_never_admitted_is_handed_back(desk: Desk) -> None:
    sequence = desk.sequence()
    desk.put(sequence.hand_back())
    desk.publisher.write()
    assert (sequence.outcome, desk.line.calls) == (Outcome.HANDED_BACK, [])
    assert desk.jobs.get(sequence.job.id, "me").attempt == 0
