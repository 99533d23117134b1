"""A sequence and the output processor turn tokens into published text, and a later attempt continues it."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from shared.errors import JobFailure
from shared.jobs.log import Written
from shared.jobs.record import Status
from shared.queue.claims import WriteResult
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.engine.output import OutputProcessor, ReplayError
from worker.engine.sequence import MIN_LOGPROB, Outcome, Sequence, SequenceOutput
from worker.runner.base import Prompt, TokenOutput
from worker.runner.fake import EOS, FakeRunner

LONG: dict[str, Any] = {"max_tokens": 40, "prompt": "a story"}


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


def whole_text(runner: FakeRunner, **request: Any) -> str:
    sequence = sequence_for(claimed(**request), runner)
    return text_of(run_alone(sequence, runner))


def test_max_tokens_ends_a_job_with_length(runner: FakeRunner) -> None:
    sequence = sequence_for(claimed(max_tokens=5), runner)
    published = run_alone(sequence, runner)
    ending = published[-1].ending
    assert ending is not None
    assert (ending.status, ending.finish_reason) == (Status.SUCCEEDED, "length")
    assert (ending.prompt_tokens, ending.completion_tokens) == (5, 5)
    assert [token for output in published for token in output.tokens] == sequence.generated


def test_the_end_token_counts_but_is_not_published(runner: FakeRunner) -> None:
    published = run_alone(sequence_for(claimed("!words=3"), runner), runner)
    ending = published[-1].ending
    assert ending is not None
    assert (ending.finish_reason, ending.completion_tokens, len(text_of(published).split())) == ("stop", 4, 3)
    assert ending.stop_string is None
    assert all(EOS not in output.tokens for output in published)


def test_a_full_context_ends_a_job_with_length() -> None:
    small = FakeRunner(context=10)
    ending = run_alone(sequence_for(claimed("1234567", max_tokens=100), small), small)[-1].ending
    assert ending is not None
    assert (ending.finish_reason, ending.completion_tokens) == ("length", 3)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_stop_string_across_tokens_ends_a_job_and_is_not_published(runner: FakeRunner, length: int) -> None:
    whole = whole_text(runner, **LONG)
    stop = whole[30 : 30 + length]
    published = run_alone(sequence_for(claimed(**LONG, stop=(stop,)), runner), runner)
    assert text_of(published) == whole[: whole.index(stop)]
    ending = published[-1].ending
    assert ending is not None
    assert (ending.finish_reason, ending.stop_string) == ("stop", stop)


def test_an_incomplete_stop_string_at_the_end_is_published(runner: FakeRunner) -> None:
    whole = whole_text(runner, **LONG)
    assert whole_text(runner, **LONG, stop=(whole[-3:] + "x",)) == whole


def published_of(sequence: Sequence, *tokens: int) -> list[SequenceOutput]:
    """Return the output of a row that generates these tokens."""
    outputs = OutputProcessor(frozenset({EOS}))
    return outputs.process({sequence.uid: sequence}, [TokenOutput(sequence.uid, token) for token in tokens])


def bytes_published(text: bytes) -> list[SequenceOutput]:
    return published_of(sequence_for(claimed(max_tokens=100)), *text, EOS)


def test_a_character_is_published_once_it_is_complete() -> None:
    published = bytes_published("né🙂".encode())
    assert [(each.text, len(each.tokens)) for each in published] == [("n", 1), ("é", 2), ("🙂", 4), ("", 0)]
    assert [output.text for each in published for output in each.outputs] == ["n", "", "é", "", "", "", "🙂"]


def test_an_incomplete_character_is_published_at_the_end() -> None:
    published = bytes_published("é".encode()[:1])
    assert [(each.text, each.tokens) for each in published] == [("\ufffd", (0xC3,))]


def test_log_probabilities_are_published_with_the_text_of_their_token() -> None:
    sequence = sequence_for(claimed(logprobs=1))
    tokens = [TokenOutput(sequence.uid, token, -0.1 * token, ((token, -0.1 * token),)) for token in "é".encode()]
    (published,) = OutputProcessor(frozenset()).process({sequence.uid: sequence}, tokens)
    assert published.outputs == tuple(tokens)
    assert published.text == "é"


class Trimming:
    """A detokenizer that holds back the last word and drops the first space, like those of mlx-lm."""

    def __init__(self) -> None:
        self.text = self.held = ""

    def add(self, token: int) -> str:
        text, self.held = self.held, " " + str(token)
        return self._passed(text)

    def finish(self) -> str:
        return self._passed(self.held)

    def _passed(self, text: str) -> str:
        text = text if self.text else text.lstrip()
        self.text += text
        return text


def test_the_text_of_a_token_with_a_log_probability_is_complete() -> None:
    sequence = sequence_for(claimed(logprobs=1))
    sequence.detokenizer = Trimming()
    tokens = [TokenOutput(sequence.uid, token, -1.0, ((token + 1, -0.5),)) for token in (7, 8)]
    OutputProcessor(frozenset(), Trimming).process({sequence.uid: sequence}, tokens)
    assert [sequence.describe_logprob(token) for token in tokens] == [
        {"token": "7", "logprob": -1.0, "top": [{"token": "8", "logprob": -0.5}]},
        {"token": " 8", "logprob": -1.0, "top": [{"token": " 9", "logprob": -0.5}]},
    ]


@pytest.mark.parametrize("stop", [(), ("after large",), ("zzz", " t")])
def test_a_retry_continues_byte_for_byte_after_any_cut(runner: FakeRunner, stop: tuple[str, ...]) -> None:
    first = run_alone(sequence_for(claimed(**LONG, stop=stop), runner), runner)
    expected = first[-1].ending
    assert expected is not None
    for cut in range(len(first)):
        tokens = tuple(token for output in first[:cut] for token in output.tokens)
        written = Written(text_of(first[:cut]), tokens, last_event=2 + cut)
        retry = sequence_for(claimed(**LONG, stop=stop, attempt=2, last_event=2 + cut), runner)
        assert OutputProcessor(runner.eos).replay(retry, written) is None
        assert retry.row().generated == len(tokens)
        second = run_alone(retry, runner)
        ending = second[-1].ending
        assert ending is not None
        assert written.text + text_of(second) == text_of(first)
        assert (ending.completion_tokens, ending.finish_reason) == (expected.completion_tokens, expected.finish_reason)
        assert "first_token_s" not in ending.timings or not tokens


def test_cached_tokens_are_those_of_the_first_prefill_and_at_most_the_prompt() -> None:
    sequence = sequence_for(claimed("hello", max_tokens=2))
    for cached in (3, 4):  # the second time, the row's own prefix is cached
        sequence.prefilled(cached)
    ending = run_alone(sequence, FakeRunner())[-1].ending
    assert ending is not None
    assert (ending.prompt_tokens, ending.cached_tokens) == (5, 3)
    continued = sequence_for(claimed("hello", max_tokens=2))
    continued.prefilled(20)  # tokens of prompt and answer together
    assert continued.stop(WriteResult.CANCELLED).ending.cached_tokens == 5  # type: ignore[union-attr]


def test_a_continued_job_counts_each_token_once(runner: FakeRunner) -> None:
    first = run_alone(sequence_for(claimed(**LONG), runner), runner)
    written = Written(text_of(first[:4]), tuple(token for output in first[:4] for token in output.tokens), last_event=6)
    retry = sequence_for(claimed(**LONG, attempt=2), runner)
    OutputProcessor(runner.eos).replay(retry, written)
    ending, undisturbed = run_alone(retry, runner)[-1].ending, first[-1].ending
    assert ending is not None
    assert undisturbed is not None
    assert (ending.prompt_tokens, ending.completion_tokens) == (
        undisturbed.prompt_tokens,
        undisturbed.completion_tokens,
    )


def test_a_replay_of_a_complete_answer_ends_the_job_without_the_engine(runner: FakeRunner) -> None:
    sequence = sequence_for(claimed(**LONG), runner)
    first = run_alone(sequence, runner)
    retry = sequence_for(claimed(**LONG, attempt=2, started_after_s=0.5), runner)
    end = OutputProcessor(runner.eos).replay(retry, Written(text_of(first), tuple(sequence.generated), 9))
    assert end is not None
    assert end.ending is not None
    assert (end.text, end.tokens, end.ending.finish_reason) == ("", (), "length")
    assert set(end.ending.timings) == {"queue_s", "total_s"}


def test_a_worker_with_less_context_ends_an_answer_that_exceeds_it(runner: FakeRunner) -> None:
    first = run_alone(sequence_for(claimed(**LONG), runner), runner)
    written = Written(text_of(first[:9]), tuple(token for output in first[:9] for token in output.tokens), 9)
    small = FakeRunner(context=12)
    retry = sequence_for(claimed(**LONG, attempt=2), small)
    end = OutputProcessor(small.eos).replay(retry, written)
    assert end is not None and end.ending is not None
    assert (end.text, end.ending.finish_reason) == ("", "length")


def test_the_log_of_another_model_is_rejected(runner: FakeRunner) -> None:
    sequence = sequence_for(claimed(attempt=2), runner)
    with pytest.raises(ReplayError):
        OutputProcessor(runner.eos).replay(sequence, Written("other words", (300,), 3))
    failed = sequence.fail(JobFailure.ENGINE, "No.")
    assert failed.ending is not None
    assert (failed.text, failed.tokens) == ("", ()), "the log stays as it is"


@pytest.mark.parametrize(("write_result", "status"), [("cancelled", Status.CANCELLED), ("expired", Status.EXPIRED)])
def test_a_stopped_job_keeps_its_text(runner: FakeRunner, write_result: str, status: Status) -> None:
    sequence = sequence_for(claimed(), runner)
    sequence.start()
    (output,) = published_of(sequence, 300)
    ending = sequence.stop(WriteResult(write_result)).ending
    assert ending is not None
    assert output.text
    assert (ending.status, ending.completion_tokens, ending.finish_reason) == (status, 1, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [500.0]
    monkeypatch.setattr("worker.engine.timings.time.monotonic", lambda: moment[0])
    return moment


def timings_of(sequence: Sequence, clock: list[float]) -> dict[str, float]:
    """Return the timings of a row that is admitted after 2 s, prefilled after 1 s more, and has two tokens of 0.5 s."""
    clock[0] += 2
    sequence.timings.admitted()
    clock[0] += 1
    sequence.prefilled(0)
    for token in (300, 301):
        clock[0] += 0.5
        published_of(sequence, token)
    assert sequence.ending is not None
    return sequence.ending.timings


def test_timings_begin_at_the_creation_by_the_clock_of_redis(clock: list[float]) -> None:
    timings = timings_of(sequence_for(claimed(max_tokens=2)), clock)
    assert timings == {"queue_s": 3.0, "prefill_s": 1.0, "first_token_s": 4.5, "total_s": 5.0}


def test_a_later_attempt_was_queued_until_the_first_one_began(clock: list[float]) -> None:
    sequence = sequence_for(claimed(max_tokens=2, attempt=2, started_after_s=0.25))
    OutputProcessor(frozenset()).replay(sequence, Written("", (), 3))
    timings = timings_of(sequence, clock)
    assert timings == {"queue_s": 0.25, "prefill_s": 1.0, "first_token_s": 4.5, "total_s": 5.0}


def test_a_second_admission_does_not_change_the_timings(clock: list[float]) -> None:
    sequence = sequence_for(claimed(max_tokens=2))
    sequence.timings.admitted()
    assert timings_of(sequence, clock)["queue_s"] == 1.0


def test_a_job_that_was_never_admitted_was_queued_until_its_end(clock: list[float]) -> None:
    sequence = sequence_for(claimed())
    clock[0] += 2
    ending = sequence.fail(JobFailure.MEMORY, "No.").ending
    assert ending is not None
    assert ending.timings == {"queue_s": 3.0, "total_s": 3.0}


def test_a_sequence_is_settled_once_by_several_threads() -> None:
    settled: list[tuple[Sequence, Outcome]] = []
    sequence = sequence_for(claimed(), on_settled=lambda *each: settled.append(each))
    threads = [threading.Thread(target=sequence.settle, args=[outcome]) for outcome in Outcome]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    sequence.settle(Outcome.ENDED)
    assert settled == [(sequence, sequence.outcome)]


def test_a_job_that_fails_before_its_admission_starts_with_its_end(runner: FakeRunner) -> None:
    assert Sequence(claimed(), Prompt(()), runner).fail(JobFailure.TEMPLATE, "No.").started
    assert not Sequence(claimed(), Prompt(()), runner).stop(WriteResult.CANCELLED).started
    admitted = sequence_for(claimed(), runner)
    assert admitted.start().started
    assert not admitted.fail(JobFailure.ROW, "No.").started


def test_a_failed_job_has_a_code_and_a_message(runner: FakeRunner) -> None:
    ending = sequence_for(claimed(), runner).fail(JobFailure.TEMPLATE, "No.").ending
    assert ending is not None
    assert (ending.status, ending.error_code, ending.error_message) == (Status.FAILED, "template_error", "No.")


def test_infinite_log_probabilities_become_json_numbers() -> None:
    sequence = sequence_for(claimed(logprobs=1))
    output = TokenOutput(sequence.uid, 7, logprob=float("-inf"), top_logprobs=((8, float("nan")),))
    described = json.dumps(sequence.describe_logprob(output), allow_nan=False)
    assert json.loads(described)["logprob"] == json.loads(described)["top"][0]["logprob"] == MIN_LOGPROB
