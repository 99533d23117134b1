"""Messages are put together from the chunks in a job's log, also from those of workers of earlier versions."""

from __future__ import annotations

from typing import Any

import pytest

from web.results.messages import MessageReader, delta_of

CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def entry(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -1.0, "top": []}


def read(*chunks: dict[str, Any]) -> MessageReader:
    reader = MessageReader()
    for chunk in chunks:
        reader.add(chunk)
    return reader


def test_the_parts_of_all_chunks_are_joined() -> None:
    reader = read(
        {"text": "<think>a", "delta": {"reasoning_content": "a"}},
        {"text": "b", "delta": {"reasoning_content": "b"}},
        {"text": "</think>", "delta": {}},
        {"text": "c", "delta": {"content": "c"}},
        {"text": "", "delta": {"content": "d", "tool_calls": [CALL]}},
    )
    assert reader.to_dict() == {
        "role": "assistant",
        "content": "cd",
        "reasoning_content": "ab",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }


@pytest.mark.parametrize(
    ("chunks", "content", "has_calls"),
    [((), "", False), (({"text": "x", "delta": {"tool_calls": [CALL]}},), None, True)],
)
def test_the_content_is_null_only_next_to_tool_calls(
    chunks: tuple[dict[str, Any], ...], content: str | None, has_calls: bool
) -> None:
    message = read(*chunks).to_dict()
    assert (message["content"], message["reasoning_content"]) == (content, None)
    assert (message["tool_calls"] is not None) is has_calls


def test_chunks_of_earlier_versions_are_content() -> None:
    old: dict[str, Any] = {"text": "a ", "logprobs": [entry("a")]}
    new: dict[str, Any] = {"text": "b", "delta": {"content": "b", "content_tokens": [1, 2]}, "logprobs": [entry("b")]}
    assert delta_of(old) == {"content": "a "}
    reader = read(old, new)
    assert reader.content == "a b"
    assert [each["token"] for each in reader.content_logprobs] == ["a", "b"]


def test_log_probabilities_of_content_come_with_it() -> None:
    """The content of a token may be held back, so that a later chunk has it."""
    reader = MessageReader()
    added = [
        reader.add({"text": "<think>", "logprobs": [entry("<think>")], "delta": {}}),
        reader.add({"text": "a</think>b<", "logprobs": [*map(entry, ("a", "</think>", "b", "<"))],
                    "delta": {"content": "b", "content_tokens": [3, 4]}}),
        reader.add({"text": "c", "logprobs": [entry("c")], "delta": {"content": "<c", "content_tokens": [4, 6]}}),
    ]  # fmt: skip
    assert [[each["token"] for each in entries] for entries in added] == [[], ["b"], ["<", "c"]]
    assert [each["token"] for each in reader.content_logprobs] == ["b", "<", "c"]
