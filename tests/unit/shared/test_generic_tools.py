"""Tools for models whose chat template knows none."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from shared.tokenizing.chat_template import features, render
from shared.tokenizing.conversation import Conversation, UnsupportedField, conversation_of
from worker.output.tool_calls import ToolCalls, ToolFormat

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Is it raining in Köln?"}


def call(call_id: str, city: str) -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def conversation(*messages: dict[str, Any], tools: bool = True) -> Conversation:
    request = {"messages": [*messages], "tools": [TOOL] if tools else None}
    return conversation_of(request, features(TEMPLATE), reasons=False, explain_tools=True)


def prompt(*messages: dict[str, Any], tools: bool = True) -> str:
    made = conversation(*messages, tools=tools)
    assert made.tools is None
    return render(TEMPLATE, made.messages, {}, add_generation_prompt=True)


def test_the_system_message_explains_the_tools() -> None:
    text = prompt(USER)
    assert text.startswith("[system]You can call functions.")
    assert json.dumps(TOOL["function"], ensure_ascii=False) in text
    assert text.endswith("[user]Is it raining in Köln?[assistant]")


def test_the_explanation_follows_the_system_message_of_the_request() -> None:
    text = prompt({"role": "system", "content": "Be brief."}, USER)
    assert text.startswith("[system]Be brief.\n\nYou can call functions.")
    parts = [{"type": "text", "text": "Be brief."}]
    made = conversation({"role": "system", "content": parts}, USER)
    assert [part["type"] for part in made.messages[0]["content"]] == ["text", "text"]


def test_the_shown_example_is_a_call_that_the_parser_reads() -> None:
    (line,) = [line for line in prompt(USER).splitlines() if line.startswith("<tool_call>")]
    form = ToolFormat.explained()
    section = line.removeprefix(form.start).removesuffix(form.end)
    (parsed,) = ToolCalls(form, [TOOL], "job", parallel=True).parse(section)
    assert parsed["function"] == {"name": "weather", "arguments": '{"parameter": "value"}'}


def test_calls_and_their_results_are_texts() -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [call("a", "Köln"), call("b", "Bonn")]}
    results = [{"role": "tool", "tool_call_id": each, "content": f"rain {each}"} for each in "ab"]
    text = prompt(USER, answer, *results, tools=False)
    assert text == (
        "[user]Is it raining in Köln?"
        '[assistant]<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
        '[user]<tool_response name="weather">\nrain a\n</tool_response>\n'
        '<tool_response name="weather">\nrain b\n</tool_response>[assistant]'
    )


def test_templates_that_ignore_tools_are_refused_without_the_explanation() -> None:
    request = {"messages": [USER], "tools": [TOOL]}
    with pytest.raises(UnsupportedField, match="does not support tools"):
        conversation_of(request, features(TEMPLATE), reasons=False)
