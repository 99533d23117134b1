"""Conversations of the Messages API become the messages of a job, and errors name their blocks."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.errors import Invalid
from web.anthropic.conversation import Conversation
from web.anthropic.schemas import CountRequest
from web.http.problems import field_path

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1, "b": "é"}}
TOOL_CALL = {
    "id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":"é"}'},
}  # fmt: skip


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def translated(*messages: Any, **fields: Any) -> Conversation:
    return Conversation(CountRequest.model_validate({"model": "m", "messages": list(messages), **fields}))


def parts(*values: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": value} for value in values]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("hi")], [{"role": "user", "content": parts("hi")}]),
        ([user("a"), user([text("b"), IMAGE])], [{"role": "user", "content": [*parts("a", "b"), IMAGE_PART]}]),
        (
            [user("a"), assistant("b"), user("c")],
            [{"role": "user", "content": parts("a")}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": parts("c")}],
        ),
        (
            [user("a"), {"role": "system", "content": [text("new"), text("rules")]}],
            [{"role": "user", "content": parts("a")}, {"role": "system", "content": "new\nrules"}],
        ),
        (
            [user([{"type": "document", "title": "T", "context": "C",
                    "source": {"type": "text", "media_type": "text/plain", "data": "D"}}])],
            [{"role": "user", "content": parts("T\n\nC\n\nD")}],
        ),
        ([user([])], [{"role": "user", "content": ""}]),
    ],
)  # fmt: skip
def test_messages(messages: list[Any], expected: list[Any]) -> None:
    assert translated(*messages).messages == expected


@pytest.mark.parametrize(("content", "expected"), [("be brief", "be brief"), ([text("a"), text("b")], "a\nb")])
def test_the_system_prompt_comes_first(content: Any, expected: str) -> None:
    first, second = translated(user("hi"), system=content).messages
    assert (first, second["role"]) == ({"role": "system", "content": expected}, "user")


def test_thinking_and_calls_of_an_earlier_answer() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    messages = translated(user("a"), assistant([thinking, text("I add."), CALL]), user([result("3")])).messages
    assert messages[1:] == [
        {"role": "assistant", "content": "I add.", "reasoning_content": "hm", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "3"},
    ]
    assert translated(user("a"), assistant([CALL]), user([result("")])).messages[1]["content"] is None


@pytest.mark.parametrize(
    ("block", "content", "images"),
    [
        (result("3"), "3", []),
        (result([text("3"), text("4")]), "3\n4", []),
        (result("no such file", is_error=True), "Error: no such file", []),
        (result([text("see"), IMAGE]), "see", [IMAGE_PART]),
        ({"type": "tool_result", "tool_use_id": "toolu_1"}, "", []),
    ],
)
def test_results_of_tools_come_before_other_blocks(block: dict[str, Any], content: str, images: list[Any]) -> None:
    messages = translated(user("a"), assistant([CALL]), user([text("and"), block])).messages
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": content},
        {"role": "user", "content": [*parts("and"), *images]},
    ]


def test_the_last_message_of_the_assistant_is_continued() -> None:
    assert not translated(user("a")).continues
    assert translated(user("a"), assistant("The answer is")).continues
    with pytest.raises(Invalid) as refused:
        translated(user("a"), assistant([CALL]))
    assert refused.value.field == "messages[1].content"


def test_a_result_without_a_call_is_refused() -> None:
    with pytest.raises(Invalid, match="toolu_1") as refused:
        translated(user([text("a"), result("3")]))
    assert refused.value.field == "messages[0].content[1].tool_use_id"


def test_paths_lead_from_a_part_to_its_block() -> None:
    conversation = translated(
        user("a"), assistant([CALL]), user([result([text("3"), IMAGE]), IMAGE]), user([IMAGE]), system="s"
    )
    images = {
        f"messages[{i}].content[{k}]"
        for i, message in enumerate(conversation.messages)
        for k, part in enumerate(message["content"] or ())
        if part == IMAGE_PART
    }
    assert {conversation.paths[image] for image in images} == {
        "messages[2].content[0].content[1]", "messages[2].content[1]", "messages[3].content[0]",
    }  # fmt: skip
    assert conversation.paths["messages[0]"] == "system"
    assert conversation.paths["messages[2]"] == "messages[1]"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([user([{"type": "text"}])], "messages[0].content[0].text"),
        ([user([text("a", colour="red")])], "messages[0].content[0].colour"),
        ([user([{"type": "video"}])], "messages[0].content[0]"),
        ([user([{"type": "image", "source": {"type": "file", "file_id": "f"}}])], "messages[0].content[0].source"),
        ([user([{**IMAGE, "transformations": {"oversized_image": "error"}}])],
         "messages[0].content[0].transformations.oversized_image"),
        ([user([{"type": "document", "source": {"type": "url", "url": "u"}}])], "messages[0].content[0].source.type"),
        ([user([CALL])], "messages[0].content"),
        ([assistant([IMAGE])], "messages[0].content"),
        ([user([result([CALL])])], "messages[0].content[0].content[0]"),
        ([], "messages"),
    ],
)  # fmt: skip
def test_an_invalid_block_is_named(messages: list[Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        translated(*messages)
    assert field in {field_path(error["loc"]) for error in refused.value.errors()}


def test_advice_is_accepted() -> None:
    advice = {"cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}}
    blocks = [text("a", **advice, citations=None), {**IMAGE, **advice}]
    with_advice = translated(user(blocks), system=[text("s", **advice)], **advice, speed="fast")
    assert with_advice.messages == translated(user([text("a"), IMAGE]), system="s").messages
