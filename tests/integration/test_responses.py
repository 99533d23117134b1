"""The Responses API with OpenAI's client, and real workers that answer from a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.plugins.stack import Stack, made_stack
from tests.support.responses import checked, kinds, known

THOUGHTS = "<think>Two numbers.\nI add them.</think>\n\n"
CALLS = "".join(
    f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": "é🙂"}}}}\n</tool_call>\n' for a in (1, 2)
)
PATCH = "*** Begin Patch\n+ « é🙂 »\n*** End Patch"
PATCH_CALL = f"<tool_call>\n{json.dumps({'name': 'patch', 'arguments': {'input': PATCH}})}\n</tool_call>"
SCRIPT = (
    {"match": "^add", "text": f"{THOUGHTS}I call the tool.\n\n{CALLS}"},
    {"match": "^only call", "text": CALLS},
    {"match": "^patch", "text": PATCH_CALL},
    {"match": "^sum: 3$", "text": "The sum is 3."},
    {"match": "^count", "text": "one two three four five"},
    {"match": "^json", "text": '{"answer": 42}'},
)
FUNCTION: Any = {
    "type": "function",
    "name": "add",
    "description": "adds two numbers",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    "strict": False,
}
CUSTOM: Any = {"type": "custom", "name": "patch", "description": "applies a patch"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The API and one worker, shared by tests that leave them unchanged."""
    script = tmp_path_factory.mktemp("script") / "script.jsonl"
    script.write_text("\n".join(map(json.dumps, SCRIPT)))
    for stack in made_stack(Path("fake"), {"BACKEND": "scripted", "SCRIPT_FILE": str(script)}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: Any, **fields: Any) -> Response:
    """Return the response, after checking that the stream of the same request adds up to the same response."""
    fields = {"model": "fake", "input": text, "seed": 1, **fields}
    extra = {"seed": fields.pop("seed")}
    whole: Response = client.responses.create(**fields, extra_body=extra)
    Response.model_validate(whole.to_dict())
    events = checked(client.responses.create(**fields, extra_body=extra, stream=True))
    assert known(Response.model_validate(events[-1]["response"])) == known(whole)
    return whole


def test_the_events_of_an_answer_with_reasoning_text_and_calls(client: openai.OpenAI) -> None:
    events = checked(client.responses.create(model="fake", input="add 1 and 2", tools=[FUNCTION], stream=True))
    part = ("output_item.added", "content_part.added")
    call = (
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
    )
    assert kinds(events) == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *(*part, "output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        *call,
        *call,
        "completed",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    assert len({item["id"] for item in done}) == 4


def test_a_conversation_with_a_function(client: openai.OpenAI) -> None:
    first = ask(client, "add 1 and 2", tools=[FUNCTION], store=False)
    reasoning, message, *calls = first.output
    assert reasoning.type == "reasoning" and reasoning.content is not None
    assert reasoning.content[0].text == "Two numbers.\nI add them."
    assert first.output_text == "I call the tool." and message.type == "message"
    assert [json.loads(call.arguments) for call in calls if call.type == "function_call"] == [
        {"a": 1, "b": "é🙂"},
        {"a": 2, "b": "é🙂"},
    ]
    assert first.usage is not None
    assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "sum: 3"}
        for call in calls
        if call.type == "function_call"
    ]
    history: Any = [{"role": "user", "content": "add 1 and 2"}, *first.output, *results]
    assert ask(client, history, tools=[FUNCTION]).output_text == "The sum is 3."


def test_a_custom_tool_gets_plain_text(client: openai.OpenAI) -> None:
    first = ask(client, "patch it", tools=[CUSTOM])
    (call,) = first.output
    assert call.type == "custom_tool_call" and (call.name, call.input) == ("patch", PATCH)
    result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "sum: 3"}
    history: Any = [{"role": "user", "content": "patch it"}, *first.output, result]
    assert ask(client, history, tools=[CUSTOM]).output_text == "The sum is 3."


def test_reasoning_as_a_summary_and_encrypted(client: openai.OpenAI) -> None:
    response = ask(
        client,
        "add",
        tools=[FUNCTION],
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        store=False,
    )
    item = response.output[0]
    assert item.type == "reasoning" and item.content is None
    assert [part.text for part in item.summary] == ["Two numbers.\nI add them."]
    sent: Any = [
        {"role": "user", "content": "count"},
        {**item.to_dict(), "summary": []},
        {"role": "user", "content": "count"},
    ]
    assert item.encrypted_content and ask(client, sent).output_text == "one two three four five"


def test_parsed_answers_and_the_streaming_helper(client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        answer: int

    with client.responses.stream(model="fake", input="add", tools=[FUNCTION]) as stream:
        final = [*stream] and stream.get_final_response()
    assert final.output_text == "I call the tool."
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.parse(model="fake", input="json", text_format=Answer)
    assert refused.value.param == "text.format", "this model does not support constraints"


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    response = ask(client, "count", max_output_tokens=2)
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    (message,) = response.output
    assert message.type == "message" and message.status == "incomplete"
