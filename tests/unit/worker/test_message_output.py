"""Sequences, the publisher and the scripted runner with answers that are split into messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.jobs.log import Written
from shared.jobs.request import Request, Sampling
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.queue.claims import WriteResult
from shared.settings import Settings
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.engine.output import OutputProcessor
from worker.engine.sequence import Sequence, SequenceOutput
from worker.output.parser import merged
from worker.queue.publisher import _batch_row
from worker.runner.scripted import Script, ScriptedRunner, load

CALL = '<tool_call>{"name": "f", "arguments": {"x": [1, 2]}}</tool_call>'
ANSWER = f"<think>\nOne two three.\n</think>\n\nFour five <six\n{CALL}"
MESSAGE = {"reasoning_content": "One two three.", "content": "Four five <six"}
TOOL = {"type": "function", "function": {"name": "f"}}
LINES: list[dict[str, Any]] = [{"match": "twice", "text": f"{CALL}\n{CALL} x"}, {"text": ANSWER}]


@pytest.fixture
def runner() -> ScriptedRunner:
    return ScriptedRunner(Script(LINES))


def asked(prompt: str = "a question", **more: Any) -> Any:
    return claimed(prompt, **{"parse": "message", "max_tokens": 200, "tools": (TOOL,), **more})


def message_of(outputs: list[SequenceOutput]) -> dict[str, Any]:
    message = merged(output.delta or {} for output in outputs)
    message.pop("content_tokens", None)
    calls = message.pop("tool_calls", [])
    return {**message, "calls": [(call["index"], call["function"]["arguments"]) for call in calls]}


def test_the_deltas_of_a_sequence_are_its_message(runner: ScriptedRunner) -> None:
    outputs = run_alone(sequence_for(asked(), runner), runner)
    assert text_of(outputs) == ANSWER
    assert message_of(outputs) == {**MESSAGE, "calls": [(0, '{"x": [1, 2]}')]}


def test_a_request_without_messages_costs_nothing(runner: ScriptedRunner) -> None:
    sequence = sequence_for(asked(parse=None), runner)
    outputs = run_alone(sequence, runner)
    assert sequence.message is None
    assert {output.delta for output in outputs} == {None}
    assert outputs[-1].ending is not None and outputs[-1].ending.reasoning_tokens is None


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_attempt_that_replays_the_log_emits_the_rest(runner: ScriptedRunner, logprobs: int | None) -> None:
    whole = run_alone(sequence_for(asked(logprobs=logprobs), runner), runner)
    for cut in range(len(whole)):
        before, second = whole[:cut], sequence_for(asked(attempt=2, logprobs=logprobs), runner)
        tokens = tuple(token for output in before for token in output.tokens)
        outputs = OutputProcessor(runner.eos)
        assert outputs.replay(second, Written(text_of(before), tokens, cut + 2)) is None
        after = run_alone(second, runner)
        assert message_of([*before, *after]) == message_of(whole)
        deltas = merged(output.delta or {} for output in [*before, *after])
        assert deltas == merged(output.delta or {} for output in whole)
        assert after[-1].ending is not None and whole[-1].ending is not None
        assert after[-1].ending.reasoning_tokens == whole[-1].ending.reasoning_tokens == 7


@pytest.mark.parametrize("max_tokens", range(1, 30))
def test_an_answer_that_max_tokens_cuts_loses_no_text(runner: ScriptedRunner, max_tokens: int) -> None:
    outputs = run_alone(sequence_for(asked(max_tokens=max_tokens), runner), runner)
    message = message_of(outputs)
    text = message.get("reasoning_content", "") + message.get("content", "")
    shown = text_of(outputs).replace("<think>", "").replace("</think>", "")
    assert "".join(text.split()) == "".join(shown.split())
    assert message["calls"] == []


def test_a_cancelled_answer_has_what_was_held_back(runner: ScriptedRunner) -> None:
    sequence = sequence_for(asked(), runner)
    outputs = OutputProcessor(runner.eos)
    runner.insert([sequence.row()])
    row = runner._rows[sequence.uid]
    published: list[SequenceOutput] = []
    while not text_of(published).endswith("five <"):
        published += outputs.process({sequence.uid: sequence}, [row.output()])
    published.append(sequence.stop(WriteResult.CANCELLED))
    assert message_of(published)["content"] == "Four five <"


@pytest.mark.parametrize(("parallel", "text"), [(True, f"{CALL}\n{CALL} x"), (False, CALL)])
def test_the_answer_ends_after_the_only_call_that_it_may_have(
    runner: ScriptedRunner, parallel: bool, text: str
) -> None:
    outputs = run_alone(sequence_for(asked("twice", parallel_tool_calls=parallel), runner), runner)
    assert text_of(outputs) == text
    assert len(message_of(outputs)["calls"]) == 1 + parallel
    assert outputs[-1].ending is not None and outputs[-1].ending.finish_reason == "stop"


def test_the_end_of_an_answer_is_written_with_what_was_held_back(runner: ScriptedRunner) -> None:
    """The last output may have no text, and its chunk has a number of its own."""
    sequence = sequence_for(asked(max_tokens=16), runner)
    outputs = run_alone(sequence, runner)
    last = outputs[-1]._replace(outputs=(), started=False, text="", delta={"content": "<"})
    first = _batch_row(sequence, outputs[:-1]).append
    held = _batch_row(sequence, [last]).append
    row = json.loads(held.to_json())
    assert (row["text"], row["tokens"], row["extra"]) == ("", "", '"delta":{"content":"<"}')
    assert row["ending"]["status"] == "succeeded"
    assert (held.n, sequence.next_event) == (first.n + 1, first.n + 2)


def test_chunks_without_a_new_part_say_so(runner: ScriptedRunner) -> None:
    sequence = sequence_for(asked(), runner)
    append = _batch_row(sequence, [SequenceOutput(sequence, text="<think>", delta={})]).append
    assert append.extra == '"delta":{}'


def request_of(*messages: dict[str, Any], **more: Any) -> Request:
    return Request("m", 9, Sampling(0.0), messages=messages, **more)


def test_the_first_line_that_matches_answers() -> None:
    script = Script(
        [
            {"match": "^done", "text": "last"},
            {"match": "write .*notes", "in": "any", "text": "any"},
            {"match": "hello", "tokens": ["he", "llo"]},
        ]
    )

    def answer(*messages: dict[str, Any]) -> str:
        ids, _ = script.answer(request_of(*messages))
        return "|".join(script.texts[each] for each in ids)

    call = {"function": {"name": "write", "arguments": '{"path": "notes"}'}}
    assert answer({"role": "user", "content": "hello"}) == "he|llo"
    assert answer({"role": "user", "content": [{"type": "text", "text": "hello"}]}) == "he|llo"
    assert (
        answer({"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "x"}) == "any"
    )
    assert answer({"role": "user", "content": "write notes"}, {"role": "tool", "content": "done"}) == "last"
    assert answer({"role": "user", "content": "else"}).replace("|", "") == "The script has no answer for this request."


def test_a_script_describes_the_model() -> None:
    card = ScriptedRunner(Script(LINES)).card
    assert (card.reasoning, card.tool_format, card.structured) == (True, "json_tools", False)
    plain = ScriptedRunner(Script([{"reasoning": False, "tool_format": None, "structured": True}, *LINES]))
    assert (plain.card.reasoning, plain.card.tool_format, plain.card.structured) == (False, None, True)
    channels = ScriptedRunner(Script([{"tool_format": "harmony"}, *LINES]))
    assert channels.card.tool_format == "harmony"


@pytest.mark.parametrize("text", [None, "not JSON", '{"match": "("}', "[1]"])
def test_a_script_that_cannot_be_used_is_an_error_of_the_model(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "script.jsonl"
    if text is not None:
        path.write_text(text)
    settings = Settings(backend="scripted", script_file=path)
    with pytest.raises(ModelError, match="SCRIPT_FILE"):
        next(load(settings, CatalogModel("m", tmp_path, "text")))


def test_sequences_of_messages_end_as_others_do(runner: ScriptedRunner) -> None:
    sequence: Sequence = sequence_for(asked(stop=("five",)), runner)
    outputs = run_alone(sequence, runner)
    assert message_of(outputs)["content"] == "Four "
    assert outputs[-1].ending is not None and outputs[-1].ending.finish_reason == "stop"
