"""The deltas of a job become the content blocks of a message, streamed and complete."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from shared.jobs.record import Job
from tests.plugins.work import claimed
from web.anthropic.answer import Answer, blocks_of, delta_event, message_of, start_event, stop_reason, usage_of
from web.anthropic.translate import ThinkingShown

EVENT = TypeAdapter[Any](RawMessageStreamEvent)


def thought(text: str) -> dict[str, Any]:
    return {"reasoning_content": text}


def said(text: str) -> dict[str, Any]:
    return {"content": text}


def call(name: str, arguments: str, index: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": f"call_{name}{index}", "function": function}]}


def events_of(*deltas: dict[str, Any], shown: ThinkingShown = "all") -> list[dict[str, Any]]:
    answer = Answer(shown)
    events = [event for delta in deltas for event in answer.add(delta)]
    events += answer.end()
    for event in events:
        EVENT.validate_python(event)
    return events


def text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def tool_block(name: str, value: Any, index: int = 0) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{name}{index}", "name": name, "input": value}


@pytest.mark.parametrize(
    ("deltas", "blocks"),
    [
        ([], []),
        ([said("a"), said("b")], [text_block("ab")]),
        ([said("\n"), said(" a")], [text_block("\n a")]),
        ([said("\n"), call("f", "{}")], [tool_block("f", {})]),
        ([said("a"), call("f", '{"x": [1]}'), call("g", "{}", 1)],
         [text_block("a"), tool_block("f", {"x": [1]}), tool_block("g", {}, 1)]),
        ([call("f", '{"x": "\\ud800\\ud83d\\ude00"}')], [tool_block("f", {"x": "\ufffd\U0001f600"})]),
        ([said("a"), call("f", "{}"), said("b")], [text_block("a"), tool_block("f", {}), text_block("b")]),
    ],
)  # fmt: skip
def test_blocks(deltas: list[dict[str, Any]], blocks: list[Any]) -> None:
    assert blocks_of(events_of(*deltas)) == blocks


def test_events_of_all_kinds_of_blocks() -> None:
    events = events_of(thought("h"), thought("m"), said("\n\n"), said("Hi"), call("f", '{"x":1}'))
    assert [(event["type"], event["index"]) for event in events] == [
        *[("content_block_start", 0), *[("content_block_delta", 0)] * 3, ("content_block_stop", 0)],
        *[("content_block_start", 1), ("content_block_delta", 1), ("content_block_stop", 1)],
        *[("content_block_start", 2), ("content_block_delta", 2), ("content_block_stop", 2)],
    ]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert [delta["type"] for delta in deltas] == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", "input_json_delta",
    ]  # fmt: skip
    assert [event["content_block"] for event in events if event["type"] == "content_block_start"] == [
        {"type": "thinking", "thinking": "", "signature": ""}, text_block(""), tool_block("f", {}),
    ]  # fmt: skip


def test_a_signature_depends_on_the_thoughts_and_not_on_their_cuts() -> None:
    whole, cut, other = (
        blocks_of(events_of(*deltas))[0] for deltas in ([thought("hm")], [thought("h"), thought("m")], [thought("ha")])
    )
    assert whole == cut
    assert whole["thinking"] == "hm"
    assert whole["signature"] not in ("", other["signature"])


def test_thoughts_can_be_left_out() -> None:
    deltas = (thought("hm"), said("Hi"))
    assert blocks_of(events_of(*deltas, shown="none")) == [text_block("Hi")]
    omitted = blocks_of(events_of(*deltas, shown="omitted"))
    assert omitted[0] == {**blocks_of(events_of(*deltas))[0], "thinking": ""}


def ended(**fields: Any) -> Job:
    return replace(claimed().job, finish_reason="stop", prompt_tokens=10, completion_tokens=5, **fields)


@pytest.mark.parametrize(
    ("job", "has_calls", "expected"),
    [
        (ended(), False, ("end_turn", None)),
        (ended(), True, ("tool_use", None)),
        (ended(stop_string="\n"), False, ("stop_sequence", "\n")),
        (replace(ended(), finish_reason="length"), True, ("max_tokens", None)),
        (replace(ended(), finish_reason="length", completion_tokens=4), False, ("model_context_window_exceeded", None)),
    ],
)
def test_why_a_message_ended(job: Job, has_calls: bool, expected: tuple[str, str | None]) -> None:
    assert stop_reason(job, 5, has_calls=has_calls) == expected
    event = delta_event(job, 5, has_calls=has_calls)
    EVENT.validate_python(event)
    assert event["delta"] == dict(zip(("stop_reason", "stop_sequence"), expected, strict=True))


def test_usage_counts_cached_tokens_apart() -> None:
    usage = usage_of(ended(cached_tokens=8))
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 8, 5)
    assert usage_of(ended()).input_tokens == 10


def test_a_message_is_one_of_the_sdk() -> None:
    content = blocks_of(events_of(thought("hm"), said("Hi"), call("f", "{}")))
    message = message_of(ended(), content, 5, has_calls=True)
    parsed = Message.model_validate_json(message.model_dump_json())
    assert [block.type for block in parsed.content] == ["thinking", "text", "tool_use"]
    assert parsed.stop_reason == "tool_use"
    start = EVENT.validate_python(start_event(ended(), 7)).message
    assert (start.id, start.content, start.usage.input_tokens) == (parsed.id, [], 7)
    assert parsed.id.startswith("msg_")
