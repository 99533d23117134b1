"""The publisher writes all output of rows once and in order, even if calls to Redis fail."""

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
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.queue.claims import Append, Claims, WriteResult
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.work import run_alone, sequence_for, text_of
from tests.support.queueing import lease, reserved
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.queue.publisher import Publisher
from worker.runner.base import TokenOutput
from worker.runner.fake import FakeRunner


class FaultyClaims:
    """Claims whose calls fail on demand, before or after they are executed."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self.faults: list[str] = []
        self.calls: list[list[Append]] = []

    def append(self, rows: Rows[Append]) -> list[WriteResult]:
        self.calls.append(list(rows))
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "lost":
            raise RedisAway("lost")
        if fault == "full":
            raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
        if fault == "faulty":
            raise ResponseError("ERR user_script:12: attempt to index a nil value")
        results = self._claims.append(rows)
        if fault == "unanswered":
            raise RedisAway("unanswered")
        return results


class Harness:
    """A publisher that a test drives step by step, jobs for it, and the results that it passed on."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.log = JobLog(client)
        self.claims = lease(client, "w1")
        self.faulty = FaultyClaims(self.claims)
        self.results: list[tuple[str, int, WriteResult]] = []
        self.started: list[str] = []
        self.publisher = Publisher(
            self.faulty,  # type: ignore[arg-type]
            lambda *write_result: self.results.append(write_result),
            on_started=lambda job: self.started.append(job.id),
        )
        self.runner = FakeRunner()

    def sequence(self, max_tokens: int = 4, **request: Any) -> Sequence:
        request_ = Request("fake", max_tokens, Sampling(0.0), prompt="hello", **request)
        self.jobs.create(Submission(request_, owner="me"))
        return self.claim()

    def claim(self) -> Sequence:
        (claimed,) = reserved(self.claims, model="fake")
        return sequence_for(claimed, self.runner)

    def outputs(self, max_tokens: int = 4) -> list[SequenceOutput]:
        """Return all outputs of a job, its start first."""
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
        """Check that the log has all text and tokens, numbers without gaps, and one end."""
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
def harness(client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Harness:
    monkeypatch.setattr("worker.queue.publisher.sleep", lambda seconds: None)
    return Harness(client, settings)


def test_each_write_makes_one_event_per_job(harness: Harness) -> None:
    outputs = harness.outputs()
    for output in outputs:
        harness.put(output)
        harness.publisher.write()
    assert harness.chunks(outputs[0].sequence) == [output.text for output in outputs[1:]]
    harness.check(outputs)


def test_an_admission_is_written_and_reported_once(harness: Harness) -> None:
    sequence = harness.sequence()
    harness.faulty.faults = ["unanswered", "lost"]
    harness.put(sequence.start())
    harness.publisher.write()
    assert harness.started == []
    harness.flush()
    assert harness.started == [sequence.job.id]
    job = harness.jobs.get(sequence.job.id, "me")
    assert (job.status, job.attempt, harness.kinds(sequence)) == (Status.RUNNING, 1, ["queued", "started"])


def test_all_outputs_between_two_writes_go_in_one_call_with_one_event_per_job(harness: Harness) -> None:
    one, two = harness.outputs(), harness.outputs(max_tokens=2)
    for first, second in zip(one, [*two, None, None], strict=True):
        harness.put(*(output for output in (first, second) if output))
    harness.publisher.write()
    assert len(harness.faulty.calls) == 1
    assert harness.chunks(one[0].sequence) == [text_of(one)]
    harness.check(one)
    harness.check(two)


@pytest.mark.parametrize("fault", ["lost", "unanswered", "full"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_failed_write_loses_nothing_and_writes_nothing_twice(harness: Harness, fault: str, at: int) -> None:
    outputs = harness.outputs()
    for number, output in enumerate(outputs):
        if number == at:
            harness.faulty.faults = [fault] * 2
        harness.put(output)
        harness.publisher.write()
    harness.flush()
    harness.check(outputs)


def test_an_unanswered_batch_is_sent_again_unchanged(harness: Harness) -> None:
    start, first, *rest = harness.outputs()
    harness.faulty.faults = ["unanswered", "lost"]
    harness.put(start, first)
    harness.publisher.write()
    for output in rest:
        harness.put(output)
        harness.publisher.write()
    assert harness.faulty.calls[0] == harness.faulty.calls[1] == harness.faulty.calls[2]
    harness.flush()
    assert harness.chunks(first.sequence) == [first.text, text_of(rest)]
    harness.check([start, first, *rest])


def test_a_later_attempt_continues_the_event_numbers(harness: Harness) -> None:
    start, first, *_ = harness.outputs()
    harness.put(start, first)
    harness.publisher.write()
    harness.claims.release([(first.sequence.job.id, first.sequence.job.claimed_at)])
    second = harness.claim()
    tokens = (TokenOutput(second.uid, 65, text="A"),)
    harness.put(second.start(), SequenceOutput(second, tokens, "A"), second.finish(Status.SUCCEEDED, reason="stop"))
    harness.publisher.write()
    assert harness.kinds(second) == ["queued", "started", "chunk", "queued", "resumed", "chunk", "done"]
    assert [event.n for event in harness.log.read(second.job.id)] == [*range(1, 8)]
    assert harness.jobs.text(harness.jobs.get(second.job.id, "me")) == first.text + "A"


def test_a_prompt_that_the_worker_tokenised_is_stored_with_the_admission(harness: Harness) -> None:
    sequence = harness.sequence()
    sequence.new_tokens = (104, 105)
    harness.put(sequence.start())
    harness.publisher.write()
    harness.claims.release([(sequence.job.id, sequence.job.claimed_at)])
    assert harness.claim().claimed.tokens == (104, 105)


def test_log_probabilities_are_written_with_their_text(harness: Harness) -> None:
    sequence = harness.sequence(logprobs=1)
    outputs = [sequence.start(), *run_alone(sequence, harness.runner)]
    harness.put(*outputs)
    harness.publisher.write()
    data = json.loads(harness.log.read(sequence.job.id)[2].data)
    assert data["text"] == text_of(outputs)
    expected = [round(output.logprob or 0.0, 6) for each in outputs for output in each.outputs]
    assert [entry["logprob"] for entry in data["logprobs"]] == expected and len(expected) == 4
    assert [len(entry["top"]) for entry in data["logprobs"]] == [1] * 4


def test_log_probabilities_are_written_only_on_request(harness: Harness) -> None:
    sequence = harness.sequence()
    harness.put(sequence.start(), SequenceOutput(sequence, (TokenOutput(sequence.uid, 65, -0.5),), "A"))
    harness.publisher.write()
    assert json.loads(harness.log.read(sequence.job.id)[-1].data) == {"text": "A"}


def test_a_cancellation_is_passed_on(harness: Harness) -> None:
    start, first, *_ = harness.outputs()
    job = first.sequence.job
    harness.put(start)
    harness.publisher.write()
    harness.jobs.stop(job.id, "me")
    harness.put(first)
    harness.publisher.write()
    assert harness.results == [(job.id, 1, WriteResult.CANCELLED)]
    assert first.sequence.outcome is None


def test_a_job_that_was_cancelled_before_its_admission_is_fenced(harness: Harness) -> None:
    start, *_ = harness.outputs()
    job = start.sequence.job
    harness.jobs.stop(job.id, "me")
    harness.put(start)
    harness.publisher.write()
    assert (start.sequence.outcome, harness.results) == (Outcome.FENCED, [(job.id, 1, WriteResult.FENCED)])
    assert harness.started == [] and harness.kinds(start.sequence) == ["queued", "done"]


def test_a_fenced_job_does_not_affect_another_in_the_batch(harness: Harness) -> None:
    kept, fenced = harness.outputs(), harness.outputs()
    job = fenced[0].sequence.job
    harness.claims.release([(job.id, job.claimed_at)])
    harness.put(fenced[0], *kept)
    harness.publisher.write()
    harness.put(fenced[1])
    harness.publisher.write()
    assert fenced[0].sequence.outcome is Outcome.FENCED
    assert harness.results == [(job.id, 1, WriteResult.FENCED)]
    assert len(harness.faulty.calls) == 1
    harness.check(kept)


def test_a_job_is_handed_back_after_its_output_is_written(harness: Harness) -> None:
    start, first, *_ = harness.outputs()
    harness.faulty.faults = ["lost"]
    harness.put(start, first, first.sequence.hand_back())
    outcomes = []
    for _ in range(2):
        harness.publisher.write()
        outcomes.append(first.sequence.outcome)
    assert outcomes == [None, Outcome.HANDED_BACK]
    assert harness.chunks(first.sequence) == [first.text]


def test_after_close_the_thread_ends_when_all_output_is_written(harness: Harness) -> None:
    outputs = harness.outputs()
    harness.faulty.faults = ["lost", "unanswered"]
    harness.put(*outputs)
    harness.publisher.close()
    harness.publisher.start()
    harness.publisher.join(5)
    assert not harness.publisher.is_alive()
    harness.check(outputs)


def test_a_permanent_error_ends_the_process(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    deaths: list[str] = []
    publisher = Publisher(harness.faulty, lambda *_: None, deaths.append)  # type: ignore[arg-type]
    harness.faulty.faults = ["faulty"]
    publisher.put(harness.outputs())
    publisher.start()
    publisher.join(5)
    assert deaths == ["its publisher thread died (ResponseError)"]
    assert "user_script" in caplog.text and len(harness.faulty.calls) == 1


def test_output_after_the_end_is_left_to_another_attempt(harness: Harness) -> None:
    early, late = (harness.sequence() for _ in range(2))
    harness.put(early.fail(JobFailure.TEMPLATE, "No."))
    harness.publisher.close()
    harness.publisher.work()
    harness.put(late.fail(JobFailure.TEMPLATE, "No."))
    assert (early.outcome, late.outcome) == (Outcome.ENDED, Outcome.HANDED_BACK)
    failed = harness.jobs.get(early.job.id, "me")
    assert (failed.status, failed.attempt) == (Status.FAILED, 1)
    assert harness.jobs.get(late.job.id, "me").status is Status.QUEUED


def test_a_job_that_was_never_admitted_is_handed_back(harness: Harness) -> None:
    sequence = harness.sequence()
    harness.put(sequence.hand_back())
    harness.publisher.write()
    assert (sequence.outcome, harness.faulty.calls) == (Outcome.HANDED_BACK, [])
    assert harness.jobs.get(sequence.job.id, "me").attempt == 0
