"""A sequence: from tokens to what is said of them, and how a later attempt goes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from shared.errors import JobFailure
from shared.jobs.log import Written
from shared.jobs.record import Status
from shared.queue.claims import Verdict
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.engine.sequence import Outcome, ReplayError, Said, Sequence
from worker.runner.fake import EOS, FakeBackend

LONG: dict[str, Any] = {"max_tokens": 40, "prompt": "a story"}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def whole_text(backend: FakeBackend, **generation: Any) -> str:
    sequence = sequence_for(claimed(**generation), backend)
    return text_of(run_alone(sequence, backend))


def test_max_tokens_ends_it_for_length(backend: FakeBackend) -> None:
    sequence = sequence_for(claimed(max_tokens=5), backend)
    said = run_alone(sequence, backend)
    ending = said[-1].ending
    assert ending is not None
    assert (ending.status, ending.finish_reason) == (Status.SUCCEEDED, "length")
    assert (ending.prompt_tokens, ending.completion_tokens) == (5, 5)
    assert ending.text == text_of(said)
    assert [token for word in said for token in word.tokens] == sequence.generated


def test_the_end_token_is_counted_and_not_said(backend: FakeBackend) -> None:
    said = run_alone(sequence_for(claimed("!words=3"), backend), backend)
    ending = said[-1].ending
    assert ending is not None
    assert (ending.finish_reason, ending.completion_tokens, len(ending.text.split())) == ("stop", 4, 3)
    assert all(EOS not in word.tokens for word in said)


def test_a_full_context_ends_it_for_length() -> None:
    small = FakeBackend(context=10)
    ending = run_alone(sequence_for(claimed("1234567", max_tokens=100), small), small)[-1].ending
    assert ending is not None
    assert (ending.finish_reason, ending.completion_tokens) == ("length", 3)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_a_stop_string_across_tokens_ends_it_and_never_leaks(backend: FakeBackend, length: int) -> None:
    whole = whole_text(backend, **LONG)
    stop = whole[30 : 30 + length]
    said = run_alone(sequence_for(claimed(**LONG, stop=(stop,)), backend), backend)
    assert text_of(said) == whole[: whole.index(stop)]
    ending = said[-1].ending
    assert ending is not None
    assert (ending.text, ending.finish_reason) == (text_of(said), "stop")


def test_a_half_stop_at_the_end_is_text_after_all(backend: FakeBackend) -> None:
    whole = whole_text(backend, **LONG)
    assert whole_text(backend, **LONG, stop=(whole[-3:] + "x",)) == whole


def bytes_said(text: bytes) -> list[Said]:
    """What is said of a row that generates these bytes as tokens, then the end token."""
    sequence = sequence_for(claimed(max_tokens=100))
    words = [sequence.push(token) for token in (*text, EOS)]
    return [word for word in words if word is not None]


def test_characters_are_said_whole_with_all_their_tokens() -> None:
    said = bytes_said("né🙂".encode())
    assert [(word.text, len(word.tokens)) for word in said] == [("n", 1), ("é", 2), ("🙂", 4), ("", 0)]


def test_a_character_cut_short_is_said_at_the_end() -> None:
    said = bytes_said("é".encode()[:1])
    assert [(word.text, word.tokens) for word in said] == [("\ufffd", (0xC3,))]


@pytest.mark.parametrize("stop", [(), ("after large",), ("zzz", " t")])
def test_a_retry_goes_on_byte_for_byte_wherever_the_first_attempt_was_cut(
    backend: FakeBackend, stop: tuple[str, ...]
) -> None:
    first = run_alone(sequence_for(claimed(**LONG, stop=stop), backend), backend)
    wanted = first[-1].ending
    assert wanted is not None
    for cut in range(len(first)):
        tokens = tuple(token for word in first[:cut] for token in word.tokens)
        written = Written(text_of(first[:cut]), tokens, last_event=2 + cut)
        retry = Sequence(claimed(**LONG, stop=stop, attempt=2, last_event=2 + cut), backend)
        assert retry.replay(written) is None
        assert retry.begin(backend.encode(retry.job.generation, {})) is None
        assert retry.row().generated == len(tokens)
        second = run_alone(retry, backend)
        ending = second[-1].ending
        assert ending is not None
        assert written.text + text_of(second) == wanted.text == ending.text
        assert (ending.completion_tokens, ending.finish_reason) == (wanted.completion_tokens, wanted.finish_reason)
        assert "first_token_s" not in ending.timings or not tokens


def test_what_was_reused_of_the_prompt_is_told_once_and_never_more_than_there_is() -> None:
    sequence = sequence_for(claimed("hello", max_tokens=2))
    for reused in (3, 4):  # the second time it finds what it has left itself
        sequence.prefilled(reused)
    ending = run_alone(sequence, FakeBackend())[-1].ending
    assert ending is not None
    assert (ending.prompt_tokens, ending.cached_tokens) == (5, 3)
    continued = sequence_for(claimed("hello", max_tokens=2))
    continued.prefilled(20)  # of prompt and answer together
    assert continued.stop(Verdict.CANCELLED).ending.cached_tokens == 5  # type: ignore[union-attr]


def test_a_continued_job_counts_the_tokens_of_its_log_once(backend: FakeBackend) -> None:
    first = run_alone(sequence_for(claimed(**LONG), backend), backend)
    written = Written(text_of(first[:4]), tuple(token for word in first[:4] for token in word.tokens), last_event=6)
    retry = Sequence(claimed(**LONG, attempt=2), backend)
    retry.replay(written)
    retry.begin(backend.encode(retry.job.generation, {}))
    ending, undisturbed = run_alone(retry, backend)[-1].ending, first[-1].ending
    assert ending is not None
    assert undisturbed is not None
    assert (ending.prompt_tokens, ending.completion_tokens) == (
        undisturbed.prompt_tokens,
        undisturbed.completion_tokens,
    )


def test_a_replay_that_is_all_there_is_ends_without_the_engine(backend: FakeBackend) -> None:
    sequence = sequence_for(claimed(**LONG), backend)
    first = run_alone(sequence, backend)
    retry = Sequence(claimed(**LONG, attempt=2), backend)
    end = retry.replay(Written(text_of(first), tuple(sequence.generated), 9))
    assert end is not None
    assert end.ending is not None
    assert (end.text, end.ending.text, end.ending.finish_reason) == ("", text_of(first), "length")


def test_another_models_log_is_refused(backend: FakeBackend) -> None:
    with pytest.raises(ReplayError):
        Sequence(claimed(attempt=2), backend).replay(Written("other words", (300,), 3))


@pytest.mark.parametrize(("verdict", "status"), [("cancelled", Status.CANCELLED), ("expired", Status.EXPIRED)])
def test_a_stopped_job_keeps_its_text(backend: FakeBackend, verdict: str, status: Status) -> None:
    sequence = sequence_for(claimed(), backend)
    backend.insert([sequence.row()])
    word = sequence.push(backend.step().tokens[0][1])
    assert word is not None
    ending = sequence.stop(Verdict(verdict)).ending
    assert ending is not None
    assert (ending.status, ending.text, ending.finish_reason) == (status, word.text, None)


def test_timings_are_durations_in_order(backend: FakeBackend) -> None:
    sequence = sequence_for(claimed(), backend)
    sequence.admitted()
    sequence.prefilled()
    ending = run_alone(sequence, backend)[-1].ending
    assert ending is not None
    times = ending.timings
    assert times["queue_s"] == pytest.approx(1, abs=0.01)
    assert times["queue_s"] <= times["first_token_s"] <= times["total_s"]
    assert 0 <= times["prefill_s"] < 1


def test_the_first_outcome_counts_and_wakes_who_waits(backend: FakeBackend) -> None:
    sequence = Sequence(claimed(), backend)
    waiting = threading.Thread(target=sequence.wait)
    waiting.start()
    sequence.settle(Outcome.FENCED)
    sequence.settle(Outcome.ENDED)
    waiting.join(5)
    assert not waiting.is_alive()
    assert sequence.wait() is Outcome.FENCED


def test_a_failed_one_says_why(backend: FakeBackend) -> None:
    ending = Sequence(claimed(), backend).fail(JobFailure.TEMPLATE, "No.").ending
    assert ending is not None
    assert (ending.status, ending.error_code, ending.error_message) == (Status.FAILED, "template_error", "No.")
