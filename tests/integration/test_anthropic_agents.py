"""Tools, thoughts and stop sequences through the Messages API, with real workers that answer from a script."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.plugins.stack import Stack, made_stack

EVENT = TypeAdapter[Any](RawMessageStreamEvent)
THOUGHTS = "<think>Two numbers.\nI add them.</think>\n\n"
CALLS = "".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": "é🙂"}}}}\n</tool_call>\n' for a in (1, 2)
)
SCRIPT = (
    {"match": "^add slowly", "text": f"{THOUGHTS}I call the tool.\n\n{CALLS}", "directives": "!every=0.05"},
    {"match": "^add", "text": f"{THOUGHTS}I call the tool.\n\n{CALLS}"},
    {"match": "^sum: 3$", "text": "The sum is 3."},
    {"match": "^count", "text": "one two three four five"},
    {"match": "two$", "text": " three four"},
)
TOOL: Any = {
    "name": "add",
    "description": "adds two numbers",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
}
THINK: Any = {"type": "adaptive"}
DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.jsonl"
    path.write_text("\n".join(map(json.dumps, SCRIPT)))
    return path


@pytest.fixture(scope="module")
def stack(script: Path) -> Iterator[Stack]:
    """The API and one worker, shared by tests that leave them unchanged."""
    for stack in made_stack(Path("fake"), {"BACKEND": "scripted", "SCRIPT_FILE": str(script)}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture
def ask(stack: Stack) -> Iterator[Callable[..., Message]]:
    """Return the answer to a request, after checking that the stream of the same request is equal."""
    with anthropic.Anthropic(base_url=stack.url, api_key=stack.key, max_retries=0) as client:
        yield lambda content, **fields: checked_message(client, stack.model, content, **fields)


def checked_message(client: anthropic.Anthropic, model: str, content: Any, **fields: Any) -> Message:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    request: dict[str, Any] = {"model": model, "max_tokens": 500, "messages": messages, **fields}
    whole = client.messages.create(**request)
    with client.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    assert known(whole) == known(streamed)
    return whole


def known(message: Message) -> dict[str, Any]:
    """Everything but the ids, which come from the job."""
    dumped = message.model_dump(exclude={"id"})
    for block in dumped["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return dumped


def summary(message: Message) -> list[tuple[str, object]]:
    blocks = message.model_dump()["content"]
    return [(block["type"], block.get("text") or block.get("thinking") or block.get("input")) for block in blocks]


CALLED = [("tool_use", {"a": 1, "b": "é🙂"}), ("tool_use", {"a": 2, "b": "é🙂"})]


def test_a_conversation_with_a_tool(ask: Callable[..., Message]) -> None:
    first = ask("add 1 and 2", tools=[TOOL], thinking=THINK)
    assert summary(first) == [
        ("thinking", "Two numbers.\nI add them."),
        ("text", "I call the tool."),
        *CALLED,
    ]
    assert first.stop_reason == "tool_use"
    assert first.usage.output_tokens_details is not None
    assert 0 < first.usage.output_tokens_details.thinking_tokens < first.usage.output_tokens
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sum: 3"}]}
        for block in first.content
        if block.type == "tool_use"
    ]
    assert len({result["tool_use_id"] for result in results}) == 2
    messages = [{"role": "user", "content": "add 1 and 2"}, first.to_param(), {"role": "user", "content": results}]
    second = ask(messages, tools=[TOOL])
    assert (summary(second), second.stop_reason) == ([("text", "The sum is 3.")], "end_turn")


def test_thoughts_are_shown_on_request(ask: Callable[..., Message]) -> None:
    for thinking in (anthropic.NOT_GIVEN, {"type": "disabled"}):
        assert ask("add", tools=[TOOL], thinking=thinking).content[0].type == "text"
    omitted = ask("add", tools=[TOOL], thinking={"type": "adaptive", "display": "omitted"}).content[0]
    shown = ask("add", tools=[TOOL], thinking=THINK).content[0]
    assert omitted.type == shown.type == "thinking"
    assert (omitted.thinking, omitted.signature) == ("", shown.signature)
    assert shown.signature


def test_one_call_at_a_time(ask: Callable[..., Message]) -> None:
    message = ask("add", tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert summary(message) == [("text", "I call the tool."), CALLED[0]]


@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({}, "one two three four five", "end_turn", None),
        ({"stop_sequences": ["four", " thr"]}, "one two", "stop_sequence", " thr"),
        ({"stop_sequences": ["six"]}, "one two three four five", "end_turn", None),
        ({"max_tokens": 2}, "one two", "max_tokens", None),
    ],
)
def test_why_an_answer_ends(
    ask: Callable[..., Message], fields: dict[str, Any], text: str, reason: str, sequence: str | None
) -> None:
    message = ask("count", **fields)
    assert summary(message) == [("text", text)]
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_the_last_message_of_the_assistant_is_continued(ask: Callable[..., Message]) -> None:
    messages = [{"role": "user", "content": "numbers"}, {"role": "assistant", "content": "one two"}]
    assert summary(ask(messages)) == [("text", " three four")]


def joined(events: list[Any]) -> list[tuple[str, object]]:
    """The blocks of a stream, as `summary` returns those of a message."""
    kinds: list[str] = []
    texts: list[str] = []
    for event in events:
        EVENT.validate_python(event.model_dump())
        if event.type == "content_block_start":
            kinds.append(event.content_block.type)
            texts.append("")
        elif event.type == "content_block_delta" and (name := DELTAS.get(event.delta.type)):
            texts[event.index] += getattr(event.delta, name)
    return [(kind, json.loads(text) if kind == "tool_use" else text) for kind, text in zip(kinds, texts, strict=True)]


@pytest.mark.parametrize("thinking", [THINK, pytest.param({"type": "disabled"}, marks=pytest.mark.long)])
def test_a_stream_continues_after_its_worker_was_killed(script: Path, thinking: Any) -> None:
    variables = {"BACKEND": "scripted", "SCRIPT_FILE": str(script), "LEASE_S": "1"}
    for stack in made_stack(Path("fake"), variables):
        stack.start_web()
        first = stack.start_worker()
        request: dict[str, Any] = {
            "model": stack.model, "max_tokens": 500, "tools": [TOOL], "thinking": thinking,
            "messages": [{"role": "user", "content": "add slowly"}],
        }  # fmt: skip
        events: list[Any] = []
        with anthropic.Anthropic(base_url=stack.url, api_key=stack.key, max_retries=0) as client:
            with client.messages.create(**request, stream=True) as stream:
                for event in stream:
                    events.append(event)
                    if event.type == "content_block_delta" and first.poll() is None:
                        stack.stop(first, signal.SIGKILL)
                        stack.spawn_worker()
            whole = client.messages.create(**request)
        assert joined(events) == summary(whole)
        assert [event.type for event in events[-2:]] == ["message_delta", "message_stop"]
        with stack.client() as native:
            jobs = native.request("GET", "/v1/jobs").json()["data"]
        assert [job["attempt"] for job in jobs] == [1, 2]
