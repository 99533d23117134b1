"""The chunks of streams: what a job's chunk adds, whichever way it is read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Gone
from shared.jobs.log import Event, EventKind
from shared.jobs.record import Job, Status
from shared.wire import to_json
from tests.plugins.work import claimed
from web.openai.answers import ChatAnswer, CompletionAnswer
from web.openai.requests import ChatRequest, CompletionRequest

TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"index": 0, "id": "call_1", "function": {"name": "add", "arguments": "{}"}}


def chat(**fields: Any) -> ChatAnswer:
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields})
    return ChatAnswer(body, job(), Mock(), Mock())


def job(**fields: Any) -> Job:
    return replace(claimed().job, status=Status.SUCCEEDED, finish_reason="stop", **fields)


def event(data: str) -> Event:
    return Event(3, EventKind.CHUNK, data)


def parsed(text: str) -> list[dict[str, Any]]:
    """The choices of all chunks in a part of a stream."""
    data = [json.loads(each.removeprefix("data: ")) for each in text.split("\n\n") if each]
    return [choice for chunk in data for choice in chunk["choices"]]


def deltas(answer: ChatAnswer, *chunks: dict[str, Any]) -> list[dict[str, Any]]:
    text = answer.chunks(0, [event(to_json(chunk)) for chunk in chunks]) + answer.end(0, job())
    return [choice["delta"] for choice in parsed(text)]


@given(st.text(min_size=1), st.text(min_size=1))
def test_chunks_of_content_are_the_same_with_and_without_parsing(text: str, content: str) -> None:
    data = {"text": text, "delta": {"content": content}}
    for form in (to_json(data), json.dumps(data, separators=(",", ":")), json.dumps(data)):
        (begin, chunk) = parsed(chat().chunks(0, [event(form)]))
        assert begin["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert chunk == {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": None}


def test_parts_of_a_message_are_streamed_as_they_come() -> None:
    chunks = [
        {"text": "<think>", "delta": {}},
        {"text": "Hm", "delta": {"reasoning_content": "Hm"}},
        {"text": "</think>I", "delta": {"content": "I", "content_tokens": [2, 3]}},
        {"text": " call.", "delta": {"content": " call."}},
        {"text": "…", "delta": {"tool_calls": [CALL]}},
    ]
    assert deltas(chat(tools=TOOLS), *chunks) == [
        {"role": "assistant", "content": None, "refusal": None},
        {"reasoning_content": "Hm"},
        {"content": "I"},
        {"content": " call."},
        {"tool_calls": [{"type": "function", **CALL}]},
        {},
    ]


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_an_answer_without_content_has_an_empty_one(tools: Any) -> None:
    begin, *others = deltas(chat(tools=tools), {"text": "Hm", "delta": {"reasoning_content": "Hm"}})
    contents = [begin["content"], *(delta["content"] for delta in others if "content" in delta)]
    assert "".join(filter(None, contents)) == "" and "" in contents


def test_choices_begin_in_order() -> None:
    answer = chat(n=3)
    first = parsed(answer.chunks(2, [event('{"text":"a","delta":{"content":"a"}}')]))
    assert [choice["index"] for choice in first] == [0, 1, 2, 2]
    assert [choice["index"] for choice in parsed(answer.chunks(0, [event('{"text":"b"}')]))] == [0]
    ended = parsed(answer.end(1, job()))
    assert [(choice["index"], choice["finish_reason"]) for choice in ended] == [(1, "stop")]


def test_a_worker_of_an_earlier_version_writes_only_text() -> None:
    assert deltas(chat(), {"text": "Hello"})[1:] == [{"content": "Hello"}, {}]


def test_a_text_completion() -> None:
    body = CompletionRequest.model_validate({"prompt": "a", "stream": True, "logprobs": 1})
    answer = CompletionAnswer(body, job(), Mock(), Mock())
    entries = [{"token": "ab", "logprob": -1.0, "top": [{"token": "ab", "logprob": -1.0}]}]
    chunks = [event(to_json({"text": "ab", "logprobs": entries}))] * 2
    first, second = parsed(answer.chunks(0, chunks))
    assert (first["text"], first["logprobs"]["text_offset"], second["logprobs"]["text_offset"]) == ("ab", [0], [2])
    assert parsed(answer.end(0, job()))[0]["finish_reason"] == "stop"


def test_missing_logprobs_are_an_error() -> None:
    body = CompletionRequest.model_validate({"prompt": "a", "logprobs": 1})
    log = Mock()
    log.read.side_effect = Gone("The log has expired.")
    with pytest.raises(Gone, match="no longer stored"):
        CompletionAnswer(body, job(), Mock(), log).whole([job()])
