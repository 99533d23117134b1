"""Validation of tools, tool calls, response formats and template options: each error names the field at fault."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from pydantic import ValidationError

from shared.jobs.request import Constraint
from web.http import problems
from web.schemas.requests import JobRequest

ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "1+1?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "2"}


def field_of(**body: object) -> str:
    """Return the path of the invalid field as clients see it, and the message."""
    with pytest.raises(ValidationError) as caught, Flask("test").test_request_context():
        JobRequest.model_validate({"prompt": "hi", **body})
    with Flask("test").test_request_context():
        body_ = problems._invalid(caught.value).get_json()
    return str(body_["detail"])


def test_a_conversation_with_tools_is_stored_as_templates_read_it() -> None:
    request = JobRequest.model_validate({"messages": [ASK, CALLED, {**RESULT, "name": "add"}], "tools": [ADD]})
    assert request.chat_messages() == (ASK, CALLED, {**RESULT, "name": "add"})
    assert request.tools and [tool.to_record() for tool in request.tools] == [ADD]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([ASK, RESULT], "messages: messages[1]: no earlier assistant message has a tool call with the id c1"),
        ([ASK, {**CALLED, "tool_calls": []}], "messages[1].tool_calls:"),
        ([ASK, {**CALLED, "role": "user"}], "messages[1]: tool_calls is allowed only in messages with role assistant"),
        ([{**ASK, "tool_call_id": "c1"}], "messages[0]: tool_call_id is allowed only in messages with role tool"),
        ([{**ASK, "reasoning_content": "x"}], "messages[0]: reasoning_content is allowed only"),
        ([{"role": "assistant"}, ASK], "messages[0]: The message must have content"),
        (
            [ASK, CALLED, {**RESULT, "tool_call_id": None}],
            "messages[2]: A message with role tool must have tool_call_id",
        ),
        ([ASK, CALLED], "messages: The last message must not be from the assistant"),
        ([{**ASK, "name": "a<b"}], "messages[0].name:"),
    ],
)
def test_an_invalid_message_is_named(messages: list[Any], error: str) -> None:
    assert field_of(prompt=None, messages=messages).startswith(error)


@pytest.mark.parametrize("arguments", ["", "{}", '{"a": {"b": [1]}}'])
def test_arguments_are_a_json_object(arguments: str) -> None:
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    request = JobRequest.model_validate({"messages": [{**CALLED, "tool_calls": [call]}, RESULT]})
    assert (request.chat_messages() or ())[0]["tool_calls"][0]["function"]["arguments"] == (arguments or "{}")


@pytest.mark.parametrize("arguments", ["1", "[]", "{", "null", "[" * 50_000, {"a": 1}])
def test_arguments_that_are_no_json_object_are_refused(arguments: object) -> None:
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    detail = field_of(prompt=None, messages=[{**CALLED, "tool_calls": [call]}, RESULT])
    assert detail.startswith("messages[0].tool_calls[0].function.arguments:")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"tools": []}, "tools:"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type:"),
        ({"tools": [{**ADD, "function": {"name": "a b"}}]}, "tools[0].function.name:"),
        ({"tools": [{**ADD, "function": {"name": "a", "x": 1}}]}, "tools[0].function.x:"),
        ({"tools": [ADD, ADD]}, "tools: tools[1] has the same name as an earlier tool: add"),
        ({"tools": [{**ADD, "function": {"name": f"f{n}"}} for n in range(129)]}, "tools:"),
        ({"tools": [{**ADD, "function": {"name": "a", "description": "x" * 2**19}}]}, "tools: All tools together"),
        ({"tool_choice": "required"}, "tool_choice: tool_choice demands a tool call, but the request has no tools"),
        ({"tool_choice": "any", "tools": [ADD]}, "tool_choice:"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": [ADD]},
            "tool_choice: No tool in tools has the name sub",
        ),
        ({"tool_choice": {"type": "function", "function": {}}, "tools": [ADD]}, "tool_choice.function.name:"),
        ({"response_format": {"type": "xml"}}, "response_format: type must be text, json_object, "),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema:"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema:"),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex:"),
        ({"response_format": {"type": "choice", "choice": []}}, "response_format.choice:"),
        ({"response_format": {"type": "choice", "choice": ["a", 1]}}, "response_format.choice[1]:"),
        ({"response_format": {"type": "regex", "regex": "a", "choice": ["a"]}}, "response_format.choice:"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: messages cannot be set"),
        ({"chat_template_kwargs": {"eos_token": ""}}, "chat_template_kwargs: eos_token cannot be set"),
        ({"chat_template_kwargs": {"_x": 1}}, "chat_template_kwargs._x"),
        ({"chat_template_kwargs": {"x": "y" * 2**16}}, "chat_template_kwargs: All variables together"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
            "enable_thinking: enable_thinking differs from chat_template_kwargs.enable_thinking",
        ),
        ({"reasoning_effort": "huge"}, "reasoning_effort:"),
        ({"thinking_budget": -1}, "thinking_budget:"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1:"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias:"),
        ({"prompt_tokens": [1]}, "messages: Send exactly one of prompt, messages and prompt_tokens"),
        ({"prompt": None, "prompt_tokens": []}, "prompt_tokens:"),
        ({"prompt": None, "prompt_tokens": [1, -1]}, "prompt_tokens[1]:"),
        ({"prompt": None, "prompt_tokens": [1], "raw": True}, "raw:"),
        ({"continue_final_message": True}, "messages: continue_final_message needs messages"),
        ({"continue_final_message": True, "prompt": None, "messages": [ASK]}, "messages: continue_final_message needs"),
    ],
)  # fmt: skip
def test_an_invalid_option_is_named(body: dict[str, Any], error: str) -> None:
    assert field_of(**body).startswith(error)


@pytest.mark.parametrize(
    ("format_", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Constraint("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}},
            Constraint("json_schema", '{"type": "object"}'),
        ),
        ({"type": "regex", "regex": "a+"}, Constraint("regex", "a+")),
        ({"type": "choice", "choice": ["ä", "b"]}, Constraint("choice", '["ä", "b"]')),
        ({"type": "grammar", "grammar": "start: X"}, Constraint("grammar", "start: X")),
    ],
)
def test_a_response_format_is_a_constraint(format_: dict[str, Any], constraint: Constraint | None) -> None:
    request = JobRequest.model_validate({"prompt": "hi", "response_format": format_})
    assert request.response_format and request.response_format.constraint() == constraint
    assert request.response_format.model_dump(exclude_none=True, by_alias=True) == format_


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_without_effect_needs_no_tools(choice: str) -> None:
    assert JobRequest.model_validate({"prompt": "hi", "tool_choice": choice}).tool_choice == choice


def test_a_final_assistant_message_can_be_continued() -> None:
    final = {"role": "assistant", "content": "1+1="}
    body = {"messages": [ASK, final], "continue_final_message": True}
    assert JobRequest.model_validate(body).chat_messages() == (ASK, final)
    for last in ({**final, "content": ""}, CALLED):
        detail = field_of(prompt=None, messages=[ASK, last], continue_final_message=True)
        assert detail.startswith("messages: continue_final_message needs messages")
