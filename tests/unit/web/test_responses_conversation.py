"""The items of a response's input become the messages of its job."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import Invalid
from web.responses.conversation import Conversation, encrypted
from web.responses.items import ITEMS

Json = dict[str, Any]
USER: Json = {"role": "user", "content": "hi"}
ASSISTANT: Json = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]}
CALL: Json = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
OUTPUT: Json = {"type": "function_call_output", "call_id": "c1", "output": "3"}
IMAGE: Json = {"type": "input_image", "image_url": "data:image/png;base64,AA"}


def converted(*items: Json, instructions: str | None = None) -> Conversation:
    parsed = ITEMS.validate_python([*items])
    return Conversation(instructions, [(f"input[{i}]", item) for i, item in enumerate(parsed)])


def texts(message: Json) -> Any:
    content = message["content"]
    return [part["text"] for part in content] if isinstance(content, list) else content


def test_successive_items_of_one_author_are_one_message() -> None:
    conversation = converted(USER, {**USER, "content": [{"type": "input_text", "text": "there"}]}, ASSISTANT, USER)
    assert [(m["role"], texts(m)) for m in conversation.messages] == [
        ("user", ["hi", "there"]),
        ("assistant", "Hello."),
        ("user", ["hi"]),
    ]
    assert conversation.paths["messages[0].content[1]"] == "input[1].content[0]"
    assert conversation.paths["messages[2]"] == "input[3]"


def test_system_messages_at_the_beginning_are_one() -> None:
    conversation = converted(
        {"role": "developer", "content": "B"}, {"role": "system", "content": "C"}, USER,
        {"role": "developer", "content": "D"}, USER, instructions="A",
    )  # fmt: skip
    assert [(m["role"], texts(m)) for m in conversation.messages] == [
        ("system", "A\n\nB\n\nC"), ("user", ["hi"]), ("developer", "D"), ("user", ["hi"]),
    ]  # fmt: skip


def test_an_answer_with_reasoning_and_calls_is_one_message() -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Hm."}],
    }
    custom = {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "é\n"}
    custom_output = {
        "type": "custom_tool_call_output",
        "call_id": "c2",
        "output": [{"type": "input_text", "text": "ok"}],
    }
    conversation = converted(USER, reasoning, ASSISTANT, CALL, custom, OUTPUT, custom_output)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant", "tool", "tool"]
    answer = conversation.messages[1]
    assert (answer["content"], answer["reasoning_content"]) == ("Hello.", "Hm.")
    assert [call["function"] for call in answer["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 1}'}, {"name": "patch", "arguments": '{"input": "\\u00e9\\n"}'},
    ]  # fmt: skip
    assert [(m["tool_call_id"], m["content"]) for m in conversation.messages[2:]] == [("c1", "3"), ("c2", "ok")]
    assert conversation.paths["messages[1].tool_calls[1]"] == "input[4]"


def test_images_of_outputs_follow_as_a_message_of_the_user() -> None:
    output = {**OUTPUT, "output": [{"type": "input_text", "text": "see"}, IMAGE]}
    conversation = converted(USER, CALL, output, USER)
    assert [(m["role"]) for m in conversation.messages] == ["user", "assistant", "tool", "user"]
    assert [part["type"] for part in conversation.messages[3]["content"]] == ["image_url", "text"]
    assert conversation.paths["messages[3].content[0]"] == "input[2].output[1]"
    assert [m["role"] for m in converted(USER, CALL, output).messages][-1] == "user", "also as the last item"


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"encrypted_content": encrypted("Hm « é🙂 »")}, "Hm « é🙂 »"),
        ({"encrypted_content": "gAAAAABfrom-another-service"}, None),
        ({"encrypted_content": "mlxq.not base64"}, None),
        ({"summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}, "a\n\nb"),
        ({"content": [{"type": "reasoning_text", "text": "c"}], "encrypted_content": encrypted("e")}, "c"),
    ],
)
def test_reasoning_of_earlier_answers(fields: Json, read: str | None) -> None:
    conversation = converted(USER, {"type": "reasoning", **fields}, ASSISTANT, USER)
    assert conversation.messages[1].get("reasoning_content") == read


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([USER, OUTPUT], "input[1].call_id"),
        ([USER, OUTPUT, CALL, USER], "input[1].call_id"),
        ([USER, {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}], "input"),
        ([{"role": "system", "content": [IMAGE]}, USER], "input"),
    ],
)
def test_impossible_conversations_are_refused(items: list[Json], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        converted(*items)
    assert refused.value.field == field


def test_texts_of_successive_items_are_joined_without_empty_ones() -> None:
    answers = [{"role": "assistant", "content": text} for text in ("", "A", "", "B")]
    conversation = converted({"role": "system", "content": ""}, {"role": "system", "content": "S"}, *answers, USER)
    assert [(m["role"], texts(m)) for m in conversation.messages] == [
        ("system", "S"), ("assistant", "A\n\nB"), ("user", ["hi"]),
    ]  # fmt: skip
