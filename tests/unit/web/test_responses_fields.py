"""Every field of the Responses API is supported, documented as advice, or refused by name."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, get_type_hints

import pytest
from openai.types import responses as sdk
from openai.types.responses import (
    input_token_count_params,
    response_create_params,
    response_input_item_param,
    tool_param,
)
from openai.types.shared_params import Reasoning as ReasoningParam
from pydantic import ValidationError

from shared.errors import Invalid
from shared.jobs.record import Priority
from shared.settings import ROOT
from web.responses import items, requests
from web.responses.requests import ResponseRequest, TokensRequest
from web.responses.translate import input_items, job_request
from web.schemas.base import RequestModel
from web.schemas.requests import JobRequest

ADVICE: dict[str, Any] = {
    "user": "u", "prompt_cache_key": "k", "safety_identifier": "s", "max_tool_calls": 3, "image": {},
    "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h",
    "client_metadata": {"thread_id": "t"},
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "conversation": "conv_1", "prompt": {"id": "p"}, "context_management": [{"type": "compaction"}],
    "moderation": {"model": "m"}, "background_options": {"completion_window": "2h"},
    "access_programs": {"cyber": "standard"},
}  # fmt: skip
ITEMS: dict[str, type[RequestModel]] = {
    "message": items.MessageItem,
    "reasoning": items.ReasoningItem,
    "function_call": items.FunctionCallItem,
    "function_call_output": items.FunctionCallOutputItem,
    "custom_tool_call": items.CustomToolCallItem,
    "custom_tool_call_output": items.CustomToolCallOutputItem,
    "item_reference": items.ItemReference,
}
TOOL: Any = {"type": "function", "name": "add"}
CUSTOM: Any = {"type": "custom", "name": "patch"}


def body(**fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"input": "hi", **fields})


def job(**fields: Any) -> JobRequest:
    request = body(**fields)
    return job_request(request, input_items(request), [], Priority.HIGH).request


def refused(fields: dict[str, Any], kind: type[RequestModel] = ResponseRequest) -> tuple[str, str]:
    """Return the field and the message of the first error."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"input": "hi", **fields})
    error = caught.value.errors()[0]
    path = ".".join(str(part) for part in error["loc"] if not str(part).startswith("("))
    return path, error["msg"]


def members(union: Any) -> list[Any]:
    """The members of a union, which may be annotated."""
    union = typing.get_args(union)[0] if typing.get_origin(union) is typing.Annotated else union
    assert typing.get_origin(union) in (typing.Union, types.UnionType)
    return [*typing.get_args(union)]


def type_names(member: Any) -> set[str]:
    """The values of the field `type` of a typed dictionary."""
    return literals(get_type_hints(member)["type"])


def literals(hint: Any) -> set[str]:
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {each for part in typing.get_args(hint) for each in literals(part)}


def names_of(model: type[RequestModel]) -> set[str]:
    return {info.alias or name for name, info in model.model_fields.items()}


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (response_create_params.ResponseCreateParamsStreaming, ResponseRequest),
        (input_token_count_params.InputTokenCountParams, TokensRequest),
        (response_create_params.StreamOptions, requests.StreamOptions),
        (sdk.ResponseTextConfigParam, requests.TextConfig),
        (sdk.ResponseFormatTextJSONSchemaConfigParam, requests.JsonSchema),
        (ReasoningParam, requests.Reasoning),
        (sdk.FunctionToolParam, requests.FunctionTool),
        (sdk.CustomToolParam, requests.CustomTool),
        (sdk.ToolChoiceAllowedParam, requests.AllowedTools),
        (sdk.ToolChoiceFunctionParam, requests.NamedTool),
        (sdk.ToolChoiceCustomParam, requests.NamedTool),
        (sdk.ResponseInputTextParam, items.InputText),
        (sdk.ResponseInputImageParam, items.InputImage),
        (sdk.ResponseOutputTextParam, items.OutputText),
        (sdk.EasyInputMessageParam, items.MessageItem),
        (response_input_item_param.Message, items.MessageItem),
        (sdk.ResponseOutputMessageParam, items.MessageItem),
        (sdk.ResponseReasoningItemParam, items.ReasoningItem),
        (sdk.ResponseFunctionToolCallParam, items.FunctionCallItem),
        (response_input_item_param.FunctionCallOutput, items.FunctionCallOutputItem),
        (sdk.ResponseCustomToolCallParam, items.CustomToolCallItem),
        (sdk.ResponseCustomToolCallOutputParam, items.CustomToolCallOutputItem),
        (response_input_item_param.ItemReference, items.ItemReference),
    ],
)
def test_no_field_of_the_client_is_forgotten(params: Any, model: type[RequestModel]) -> None:
    fields = {"async" if name == "async_" else name for name in get_type_hints(params)}
    assert fields - names_of(model) == set()


def test_the_client_knows_everything_that_can_be_included() -> None:
    assert set(typing.get_args(sdk.ResponseIncludable)) == set(typing.get_args(requests.Includable))


@pytest.mark.parametrize(
    "kind", members(response_input_item_param.ResponseInputItemParam), ids=lambda kind: kind.__name__
)
def test_items_of_other_types_are_refused_by_name(kind: Any) -> None:
    assert type_names(kind)
    for name in type_names(kind) - ITEMS.keys():
        field, message = refused({"input": [{"type": name}]})
        assert field == "input.0" and repr(name) in message and "function_call_output" in message


@pytest.mark.parametrize("kind", members(tool_param.ToolParam), ids=lambda kind: kind.__name__)
def test_tools_of_other_types_are_refused_by_name(kind: Any) -> None:
    assert type_names(kind)
    for name in type_names(kind) - {"function", "custom"}:
        field, message = refused({"tools": [{"type": name}]})
        assert field == "tools.0" and repr(name) in message and "supported: function, custom" in message


@pytest.mark.parametrize("kind", ["input_file", "input_audio", "text"])
def test_parts_of_other_types_are_refused_by_name(kind: str) -> None:
    field, message = refused({"input": [{"role": "user", "content": [{"type": kind}]}]})
    assert field == "input.0.content.0" and repr(kind) in message


def test_every_field_is_in_the_documentation() -> None:
    page = (ROOT / "docs/responses.md").read_text()
    table = page.partition("## Fields")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (supported|advice|refused) \|", table, re.MULTILINE)
    documented = {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(documented) == set(ResponseRequest.model_fields)
    assert {name for name, kind in documented.items() if kind == "advice"} == set(ADVICE)
    assert {name for name, kind in documented.items() if kind == "refused"} == set(REFUSED)
    described = page.partition("## Items")[2].partition("\n## ")[0]
    assert [name for name in ITEMS if f"`{name}`" not in described] == []


@pytest.mark.parametrize("field", ADVICE)
def test_advice_changes_nothing(field: str) -> None:
    assert job(**{field: ADVICE[field]}) == job()


@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_fields_are_refused_by_name(field: str) -> None:
    assert refused({field: REFUSED[field]})[0] == field
    assert job(**{field: None}) == job()


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"max_output_tokens": 9}, "max_tokens", 9),
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_logprobs": 4}, "logprobs", 4),
        ({"include": ["message.output_text.logprobs"]}, "logprobs", 0),
        ({"metadata": {"a": "b"}}, "metadata", {"a": "b"}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, "reasoning_effort", "low"),
        ({"service_tier": "flex"}, "priority", "batch"),
        ({"service_tier": "ultrafast"}, "priority", "high"),
        ({"seed": -1}, "seed", 2**63 - 1),
        ({"stop": "a"}, "stop", ["a"]),
        ({"enable_thinking": False}, "enable_thinking", False),
        ({"thinking_budget": 5}, "thinking_budget", 5),
        ({"adapter": "sql"}, "adapter", "sql"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", {"x": 1}),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", False),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "required"),
    ],
)  # fmt: skip
def test_fields_reach_the_job(fields: dict[str, Any], name: str, value: Any) -> None:
    made = job(**fields)
    assert getattr(made, name) == value and name in made.model_fields_set
    assert name in ("parallel_tool_calls", "tool_choice") or name not in job().model_fields_set, "models have defaults"


def test_formats_reach_the_job() -> None:
    schema = {"type": "object", "properties": {}}
    made = job(text={"format": {"type": "json_schema", "name": "s", "schema": schema}, "verbosity": "low"})
    assert made.response_format is not None
    constraint = made.response_format.constraint()
    assert constraint is not None and (constraint.kind, constraint.source) == (
        "json_schema",
        str(schema).replace("'", '"'),
    )
    assert job(text={"format": {"type": "json_object"}}).response_format is not None
    assert job(text={"format": {"type": "text"}}) == job()


def test_only_allowed_tools_reach_the_job() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [CUSTOM]}
    made = job(tools=[TOOL, CUSTOM], tool_choice=choice)
    assert made.tools is not None
    assert ([tool.function.name for tool in made.tools], made.tool_choice) == (["patch"], "required")
    named = job(tools=[TOOL, CUSTOM], tool_choice=CUSTOM).tool_choice
    assert not isinstance(named, str) and named.function.name == "patch"


def test_grammars_of_custom_tools_reach_the_job() -> None:
    def function(syntax: str, definition: str) -> Any:
        form = {"type": "grammar", "syntax": syntax, "definition": definition}
        (tool,) = job(tools=[{**CUSTOM, "format": form}]).tools or ()
        return tool.function

    by_regex, by_lark = function("regex", "a|b"), function("lark", 'start: "a"')
    assert by_regex.strict and by_regex.parameters["properties"]["input"]["pattern"] == "^(?:a|b)$"
    assert by_lark.grammar == 'start: "a"'
    (free,) = job(tools=[CUSTOM]).tools or ()
    assert free.function.strict is None and free.function.grammar is None


def test_functions_are_strict_only_if_they_say_so() -> None:
    made = job(tools=[TOOL, {**TOOL, "name": "sub", "strict": True, "parameters": {"type": "object"}}])
    assert [tool.function.strict for tool in made.tools or ()] == [None, True]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"background": True, "store": False}, "store"),
        ({"tools": [TOOL, {**CUSTOM, "name": "add"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "name": "add"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [CUSTOM]}}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"include": ["x"]}, "include.0"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f", "image_url": "x"}]}]},
         "input.0.content.0.file_id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"unknown": 1}, "unknown"),
    ],
)  # fmt: skip
def test_invalid_requests_name_the_field(fields: dict[str, Any], field: str) -> None:
    assert refused(fields)[0] == field


CALL: Any = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
OUTPUT: Any = {"type": "function_call_output", "call_id": "c", "output": "x"}
USER: Any = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input": [USER, OUTPUT]}, "input[1].call_id"),
        ({"input": [USER, CALL, {**OUTPUT, "type": "custom_tool_call_output"}]}, "input[2].call_id"),
        ({"input": [USER, CALL]}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [USER, {**CALL, "arguments": "x"}, USER]}, "input[1].arguments"),
        ({"input": [USER, {**CALL, "name": "a b"}, USER]}, "input[1]"),
        ({"tools": [TOOL, {**TOOL, "name": "sub", "description": "x" * 2**20}]}, "tools"),
    ],
)  # fmt: skip
def test_invalid_fields_of_the_job_are_named_as_in_the_request(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        job(**fields)
    assert caught.value.field == field
