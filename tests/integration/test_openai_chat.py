"""Chat completions with OpenAI's client, and real workers that answer from a script."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.plugins.stack import Stack, made_stack

THOUGHTS = "<think>Two numbers.\nI add them.</think>\n\n"
CALLS = "".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": "é🙂"}}}}\n</tool_call>\n' for a in (1, 2)
)
SCRIPT = (
    {"match": "^add slowly", "text": f"{THOUGHTS}I call the tool.\n\n{CALLS}", "directives": "!every=0.05"},
    {"match": "^add", "text": f"{THOUGHTS}I call the tool.\n\n{CALLS}"},
    {"match": "^only call", "text": CALLS},
    {"match": "^malformed", "text": 'So: <tool_call>{"name": "add", "arguments": {"a": 1</tool_call>'},
    {"match": "^sum: 3$", "text": "The sum is 3."},
    {"match": "^count", "text": "one two three four five"},
)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}


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


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, content: Any, **fields: Any) -> ChatCompletion:
    """Return the answer, after checking that the stream of the same request adds up to the same answer."""
    messages: Any = content if isinstance(content, list) else [{"role": "user", "content": content}]
    fields = {"seed": 1, **fields}
    whole: ChatCompletion = client.chat.completions.create(model="fake", messages=messages, **fields)
    with client.chat.completions.stream(
        model="fake", messages=messages, stream_options={"include_usage": True}, **fields
    ) as stream:
        streamed = stream.get_final_completion()
    assert known(whole) == known(streamed)
    return whole


def known(completion: ChatCompletion) -> dict[str, Any]:
    """Everything but the ids and the time, which come from the job, and what only one of the two forms has."""
    dumped = completion.model_dump(exclude={"id", "created", "object"})
    for choice in dumped["choices"]:
        choice["message"].pop("parsed", None)
        for call in choice["message"]["tool_calls"] or ():
            call.pop("id")
            call["function"].pop("parsed_arguments", None)
            call.pop("index", None)
        choice["message"]["tool_calls"] = choice["message"]["tool_calls"] or None
    return dumped


def calls(completion: ChatCompletion) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in completion.choices[0].message.tool_calls or ()
        if call.type == "function"
    ]


CALLED = [("add", {"a": 1, "b": "é🙂"}), ("add", {"a": 2, "b": "é🙂"})]


def test_a_conversation_with_a_tool(client: openai.OpenAI) -> None:
    first = ask(client, "add 1 and 2", tools=[TOOL])
    (choice,) = first.choices
    assert choice.message.content == "I call the tool."
    assert choice.message.reasoning_content == "Two numbers.\nI add them."  # type: ignore[attr-defined]
    assert (calls(first), choice.finish_reason) == (CALLED, "tool_calls")
    assert first.usage is not None and first.usage.completion_tokens_details is not None
    assert 0 < (first.usage.completion_tokens_details.reasoning_tokens or 0) < first.usage.completion_tokens
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sum: 3"} for call in choice.message.tool_calls or ()
    ]
    assert len({result["tool_call_id"] for result in results}) == 2
    second = ask(client, [{"role": "user", "content": "add 1 and 2"}, choice.message, *results], tools=[TOOL])
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("The sum is 3.", "stop")


def test_content_is_null_next_to_tool_calls(client: openai.OpenAI) -> None:
    completion = ask(client, "only call", tools=[TOOL], parallel_tool_calls=False)
    assert completion.choices[0].message.content is None
    assert calls(completion) == CALLED[:1]


def test_a_malformed_call_is_text(client: openai.OpenAI) -> None:
    completion = ask(client, "malformed", tools=[TOOL])
    assert (calls(completion), completion.choices[0].finish_reason) == ([], "stop")
    assert "<tool_call>" in (completion.choices[0].message.content or "")


def test_answers_end_at_limits(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError) as caught:  # from the stream
        ask(client, "count", max_completion_tokens=2)
    assert caught.value.completion.choices[0].message.content == "one two"
    stopped = ask(client, "count", stop=[" four", "six"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one two three", "stop")


def test_choices_are_independent(client: openai.OpenAI, stack: Stack) -> None:
    completion = ask(client, "count", n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {choice.message.content for choice in completion.choices} == {"one two three four five"}
    assert completion.usage is not None
    one = ask(client, "count").usage
    assert one is not None
    assert completion.usage.prompt_tokens == one.prompt_tokens
    assert completion.usage.completion_tokens == 3 * one.completion_tokens
    with stack.client() as native:
        job = native.request("GET", f"/v1/jobs/{completion.id.removeprefix('chatcmpl-')}").json()
    assert len(job["children"]) == 2


def test_logprobs_are_those_of_the_content(client: openai.OpenAI) -> None:
    completion = ask(client, "add", tools=[TOOL], logprobs=True, top_logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    text = b"".join(bytes(token.bytes or ()) for token in logprobs.content).decode()
    assert text.strip() == "I call the tool."
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)


def test_the_chunks_of_a_stream(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "count"}]
    with client.chat.completions.with_streaming_response.create(
        model="fake", messages=messages, stream=True, stream_options={"include_usage": True}
    ) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["X-Request-ID"]
        path = response.headers["Location"]
        lines = [line for line in response.iter_lines() if line]
    assert lines[0].startswith(":"), "a comment opens the stream before the job starts"
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(each) for each in data[:-1]]
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{path.rpartition('/')[2]}"}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0


def test_the_usage_is_sent_only_on_request(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "count"}]
    chunks = [*client.chat.completions.create(model="fake", messages=messages, stream=True)]
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_a_stream_survives_its_worker(script: Path) -> None:
    """The worker is killed in the middle of a streamed answer with tool calls; nothing is lost or repeated."""
    variables = {"BACKEND": "scripted", "SCRIPT_FILE": str(script), "LEASE_S": "1"}
    for stack in made_stack(Path("fake"), variables):
        stack.start_web()
        worker = stack.start_worker()
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "add slowly"}]
            with client.chat.completions.stream(model="fake", messages=messages, tools=[TOOL], n=2) as stream:
                ids = set()
                for number, event in enumerate(event for event in stream if event.type == "chunk"):
                    ids.add(event.chunk.id)
                    if number == 20:
                        worker.send_signal(signal.SIGKILL)
                        worker.wait()
                        stack.start_worker()
                completion = stream.get_final_completion()
        assert len(ids) == 1
        assert calls(completion) == CALLED
        assert [choice.message.content for choice in completion.choices] == ["I call the tool."] * 2


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
