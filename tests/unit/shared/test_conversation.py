"""Conversations reach each template as it expects them, or are refused with the field that it does not support."""

from __future__ import annotations

from typing import Any

import pytest

from shared.tokenizing.chat_template import features
from shared.tokenizing.chat_tokenizer import CannotTokenize, FileTokenizer, tokenize
from shared.tokenizing.messages import TokenizerSource
from tests.support.chat_templates import (
    ALL,
    ASK,
    CALL,
    CALLED,
    DEEPSEEK,
    GPT,
    LLAMA,
    PRINTING,
    QWEN,
    RESULT,
    TOOL,
    VARIABLES,
)
from tests.support.chat_tokenizers import byte_level

ARGUMENTS = '{"city": "Köln", "days": [1, null]}'
SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be kind."}


def make(template: str | None, **variables: Any) -> FileTokenizer:
    source = TokenizerSource("", chat_template=template, variables={**VARIABLES, **variables})
    return FileTokenizer(source, byte_level())


def rendered(template: str, *messages: dict[str, Any], default: dict[str, Any] | None = None, **request: Any) -> str:
    tokenizer = make(template, **(default or {}))
    fields = {"prompt": "", "messages": [*messages], "share_system_prompt": False, **request}
    ids, _ = tokenize(tokenizer, fields)
    text: str = tokenizer._tokenizer.decode([*ids], skip_special_tokens=False)
    return text


def refusal(template: str | None, *messages: dict[str, Any], **request: Any) -> tuple[str | None, str]:
    with pytest.raises(CannotTokenize) as caught:
        rendered(template or "", *messages, **request) if template else tokenize(make(None), {**request})
    assert caught.value.code == "template_error"
    return caught.value.field, str(caught.value)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'),
        (DEEPSEEK, f"<|call|>weather {ARGUMENTS}</s>"),
        (PRINTING, f"weather({ARGUMENTS})"),
        (GPT, f"to=functions.weather<|message|>{ARGUMENTS}<|call|>"),
    ],
    ids=["qwen", "deepseek", "printing", "gpt"],
)
def test_arguments_are_json_whatever_the_template_does_with_them(template: str, expected: str) -> None:
    assert expected in rendered(template, ASK, CALLED, RESULT)
    no_arguments = {**CALL, "function": {"name": "weather", "arguments": "{}"}}
    assert "{}" in rendered(template, ASK, {**CALLED, "tool_calls": [no_arguments]}, RESULT)


def test_results_have_the_name_of_their_function() -> None:
    assert rendered(PRINTING, ASK, CALLED, RESULT).endswith("12 °C by weather ")
    assert rendered(PRINTING, ASK, CALLED, {**RESULT, "name": "other"}).endswith("by other ")
    assert '<|start|>functions.weather<|message|>"12 °C"<|end|>' in rendered(GPT, ASK, CALLED, RESULT)


@pytest.mark.parametrize("template", [QWEN, DEEPSEEK, PRINTING, GPT], ids=["qwen", "deepseek", "printing", "gpt"])
def test_tools_are_in_the_prompt(template: str) -> None:
    assert rendered(template, SYSTEM, ASK, tools=[TOOL]) != rendered(template, SYSTEM, ASK)
    assert rendered(template, SYSTEM, ASK, tools=[]) == rendered(template, SYSTEM, ASK, tools=None)


def test_a_template_without_tools_refuses_them() -> None:
    assert refusal(LLAMA, ASK, tools=[TOOL]) == ("tools", "This model's chat template does not support tools.")
    for messages in ([ASK, CALLED, ASK], [ASK, CALLED, RESULT]):
        field, message = refusal(LLAMA, *messages)
        assert field == "messages" and "does not support tool calls" in message


@pytest.mark.parametrize("option", [{"tools": [TOOL]}, {"template_variables": {"x": 1}}])
def test_a_prompt_without_a_template_has_no_tools_and_variables(option: dict[str, Any]) -> None:
    field, message = refusal(None, prompt="hi", messages=None, raw=True, share_system_prompt=False, **option)
    assert field in ("tools", "chat_template_kwargs") and message == f"{field} needs a chat template."


def test_the_developer_is_the_system_for_templates_that_do_not_know_it() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert rendered(QWEN, DEVELOPER, ASK) == rendered(QWEN, system, ASK)
    assert "developer<|message|>Be kind.<|end|>" in rendered(GPT, DEVELOPER, ASK)
    both = {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert rendered(QWEN, SYSTEM, DEVELOPER, ASK) == rendered(QWEN, both, ASK)
    assert rendered(QWEN, SYSTEM, ASK, DEVELOPER) == rendered(QWEN, SYSTEM, ASK, system)
    all_three = {"role": "system", "content": "Be brief.\n\nBe kind.\n\nBe kind."}
    assert rendered(QWEN, SYSTEM, DEVELOPER, DEVELOPER, ASK) == rendered(QWEN, all_three, ASK)


@pytest.mark.parametrize(
    ("template", "variables", "same_as"),
    [
        (QWEN, {"enable_thinking": True}, {}),
        (QWEN, {"reasoning_effort": "high"}, {}),
        (QWEN, {"reasoning_effort": "none"}, {"enable_thinking": False}),
        (QWEN, {"reasoning_effort": "none", "enable_thinking": True}, {}),
        (DEEPSEEK, {"enable_thinking": False}, {}),
        (DEEPSEEK, {"enable_thinking": True}, {"thinking": True}),
        (DEEPSEEK, {"reasoning_effort": "low"}, {"thinking": True}),
        (GPT, {"enable_thinking": True}, {}),
        (GPT, {"reasoning_effort": "medium"}, {}),
        (LLAMA, {"enable_thinking": False}, {}),
        (LLAMA, {"reasoning_effort": "high"}, {}),
    ],
)
def test_reasoning_options_have_the_name_that_the_template_uses(
    template: str, variables: dict[str, Any], same_as: dict[str, Any]
) -> None:
    assert rendered(template, ASK, template_variables=variables) == rendered(template, ASK, template_variables=same_as)


@pytest.mark.parametrize(
    ("template", "one", "other"),
    [
        (QWEN, {"enable_thinking": True}, {"enable_thinking": False}),
        (DEEPSEEK, {"enable_thinking": True}, {"enable_thinking": False}),
        (GPT, {"reasoning_effort": "low"}, {"reasoning_effort": "high"}),
    ],
)
def test_reasoning_options_change_the_prompt(template: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert rendered(template, ASK, template_variables=one) != rendered(template, ASK, template_variables=other)


@pytest.mark.parametrize(
    ("template", "default", "variables", "field", "message"),
    [
        (LLAMA, {}, {"enable_thinking": True}, "enable_thinking", "cannot be true: this model does not reason."),
        (LLAMA, {"enable_thinking": True}, {"enable_thinking": False}, "enable_thinking", "this model always reasons."),
        (GPT, {}, {"enable_thinking": False}, "enable_thinking", "cannot be false: this model always reasons."),
        (QWEN, {}, {"thinking_mode": 1}, "chat_template_kwargs.thinking_mode", "has no variable thinking_mode."),
        (QWEN, {}, {"messages": []}, "chat_template_kwargs.messages", "messages cannot be a variable"),
    ],
)
def test_an_option_that_the_template_does_not_have_is_refused(
    template: str, default: dict[str, Any], variables: dict[str, Any], field: str, message: str
) -> None:
    refused, text = refusal(template, ASK, default=default, template_variables=variables)
    assert refused == field and message in text


def test_reasoning_is_passed_back_under_both_names() -> None:
    answer = {"role": "assistant", "content": "Yes", "reasoning_content": "Clouds."}
    assert "analysis<|message|>Clouds.<|end|>" in rendered(GPT, ASK, answer, ASK)
    assert "<think>" not in rendered(QWEN, ASK, answer, ASK), "the template drops the reasoning of earlier turns"
    assert "<think>\nClouds.\n</think>\n\nYes" in rendered(QWEN, ASK, answer, continue_final=True)


@pytest.mark.parametrize("template", ALL)
def test_a_final_message_stays_open(template: str) -> None:
    answer = {"role": "assistant", "content": "It is "}
    text = rendered(ALL[template], ASK, answer, continue_final=True)
    assert text.endswith("It is" if template == "llama" else "It is "), "the template may remove white space"
    assert text == rendered(ALL[template], ASK, answer, add_generation_prompt=False)[: len(text)]


def test_a_final_message_that_the_template_changes_cannot_be_continued() -> None:
    template = "{{ messages[-1].content | upper }}"
    field, message = refusal(template, ASK, {"role": "assistant", "content": "It is"}, continue_final=True)
    assert field == "continue_final_message" and "changes the last message" in message


def test_features_of_a_template() -> None:
    known = features(QWEN)
    assert known and {"tools", "enable_thinking", "messages"} <= known.variables and "tool_call" in known.literals
    assert "thinking" not in known.variables
    assert features("{% nonsense %}") is None
    nested = features(
        "{% macro m(x) %}{{ x }}{{ deep }}{% endmacro %}{% if not a is defined %}{% set a = 1 %}{% endif %}"
    )
    assert nested and {"deep", "a"} <= nested.variables
