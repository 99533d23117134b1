"""Requests of the Messages API become requests for jobs: every field has its effect, is advice, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_type_hints

import pytest
from anthropic.types import ToolParam, message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from pydantic import ValidationError

from shared.errors import Invalid
from shared.models.registry import ModelCard
from web.anthropic.schemas import CountRequest, MessagesRequest, Tool
from web.anthropic.translate import Translated, job_request, original_fields, thinking_shown
from web.http.problems import field_path

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "add", "description": "adds", "input_schema": SCHEMA}
CARD = ModelCard("m", "text", context=1000, reasoning=True)

REFUSED = {
    "container", "mcp_servers", "compaction", "fallbacks", "fallback_credit_token", "thread", "billing_policy",
}  # fmt: skip
"""Fields of the SDK that would change the answer and are not supported."""
HEADERS = {"betas", "user_profile_id", "workspace_id"}
"""Parameters of the SDK that it sends as headers."""


def translated(card: ModelCard | None = CARD, **fields: Any) -> Translated:
    body = {"model": "m", "max_tokens": 64, "messages": MESSAGES, **fields}
    return job_request(MessagesRequest.model_validate(body), card)


def changed(**fields: Any) -> dict[str, Any]:
    """The fields of the job's request that are not their defaults."""
    request = translated(**fields).request
    common = {"model", "messages", "parse", "max_tokens"}
    return request.model_dump(mode="json", exclude_defaults=True, exclude=common, by_alias=True)


OFF = {"enable_thinking": False}
ON = {"enable_thinking": True}
FUNCTION = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, OFF),
        ({"thinking": {"type": "disabled"}}, OFF),
        ({"thinking": {"type": "adaptive"}}, ON),
        ({"thinking": {"type": "enabled", "budget_tokens": 32}}, ON | {"thinking_budget": 32}),
        ({"stop_sequences": ["a", "b"]}, OFF | {"stop": ["a", "b"]}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, OFF | {"temperature": 0.5, "top_p": 0.9, "top_k": 3}),
        ({"adapter": "sql"}, OFF | {"adapter": "sql"}),
        ({"metadata": {"user_id": "u"}}, OFF | {"metadata": {"user_id": "u"}}),
        ({"output_config": {"effort": "max"}}, OFF | {"reasoning_effort": "max"}),
        ({"tools": [TOOL]}, OFF | {"tools": [FUNCTION]}),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, OFF | {"tools": [FUNCTION]}),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, OFF | {"tools": [FUNCTION], "tool_choice": "required"}),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, OFF | {"tools": [FUNCTION], "tool_choice": "none"}),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
         OFF | {"tools": [FUNCTION], "parallel_tool_calls": False}),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "add"}},
         OFF | {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
         OFF | {"response_format": {"type": "json_schema",
                                    "json_schema": {"name": "output", "schema": SCHEMA, "strict": True}}}),
        ({"service_tier": "auto", "inference_geo": "us", "speed": "fast", "diagnostics": {"previous_message_id": None},
          "cache_control": {"type": "ephemeral"},
          "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, OFF),
    ],
)  # fmt: skip
def test_fields(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changed(**fields) == expected


def test_strict_tools() -> None:
    (tool,) = translated(tools=[TOOL | {"strict": True}]).request.tools or ()
    assert tool.function.strict is True


def test_a_message_of_the_assistant_at_the_end_is_continued() -> None:
    request = translated(messages=[*MESSAGES, {"role": "assistant", "content": "The"}]).request
    assert request.continue_final_message
    assert not translated().request.continue_final_message


@pytest.mark.parametrize(("card", "expected"), [(CARD, 1000), (None, 32_000)])
def test_max_tokens_is_limited_to_the_context(card: ModelCard | None, expected: int) -> None:
    assert translated(card, max_tokens=32_000).request.max_tokens == expected


def test_a_model_that_does_not_think_satisfies_every_budget() -> None:
    thinking = {"type": "enabled", "budget_tokens": 32}
    request = translated(replace(CARD, reasoning=False), thinking=thinking).request
    assert request.thinking_budget is None and request.enable_thinking is None, "this model's template would refuse it"
    assert translated(None, thinking=thinking).request.thinking_budget == 32


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, "none"),
        ({"type": "disabled"}, "none"),
        ({"type": "adaptive"}, "all"),
        ({"type": "adaptive", "display": "omitted"}, "omitted"),
        ({"type": "enabled", "budget_tokens": 9, "display": "summarized"}, "all"),
    ],
)
def test_which_thoughts_are_shown(thinking: Mapping[str, Any] | None, shown: str) -> None:
    body = {"model": "m", "messages": MESSAGES, "thinking": thinking}
    assert thinking_shown(CountRequest.model_validate(body)) == shown


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 64}}, "max_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking"),
        ({"tools": [TOOL | {"type": "bash_20250124"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"input_examples": []}]}, "tools[0].input_examples"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "all"}}, "tool_choice"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"metadata": {"user": "a"}}, "metadata.user"),
        ({"temperature": "hot"}, "temperature"),
    ],
)
def test_an_invalid_field_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        translated(**fields)
    assert [field_path(error["loc"]) for error in refused.value.errors()] == [field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": [TOOL, TOOL | {"name": "a b"}]}, "tools[1].name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"stop_sequences": ["é" * 1000] * 9}, "stop_sequences"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": ""}]}, "messages"),
    ],
)
def test_errors_of_the_job_name_the_fields_of_the_request(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        translated(**fields)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("messages[1].content[0]", "messages[3].content[2]"),
        ("messages[1].content[0].image_url.url", "messages[3].content[2]"),
        ("messages[1].tool_calls[0].id", "messages[3]"),
        ("messages[7]", "messages[7]"),
        ("tools[0].function.parameters.type", "tools[0].input_schema.type"),
        ("tools[0].function.name", "tools[0].name"),
        ("response_format.json_schema.schema.$ref", "output_config.format.schema.$ref"),
        ("response_format", "output_config.format"),
        ("stop[3]", "stop_sequences[3]"),
        ("model", "model"),
    ],
)
def test_fields_of_the_job_are_named_as_in_the_request(field: str, expected: str) -> None:
    paths = {"messages[1]": "messages[3]", "messages[1].content[0]": "messages[3].content[2]"}
    with pytest.raises(Invalid) as refused, original_fields(paths):
        raise Invalid("no", field=field)
    assert refused.value.field == expected


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (message_create_params.MessageCreateParamsNonStreaming, MessagesRequest),
        (message_create_params.MessageCreateParamsStreaming, MessagesRequest),
        (beta_create_params.MessageCreateParamsNonStreaming, MessagesRequest),
        (message_count_tokens_params.MessageCountTokensParams, CountRequest),
        (ToolParam, Tool),
    ],
)
def test_every_field_of_the_sdk_is_known(params: type, model: type[CountRequest | Tool]) -> None:
    """A new version of the SDK may have new fields: each must be supported, advice, or listed as refused."""
    names = set(get_type_hints(params)) - HEADERS
    assert names - set(model.model_fields) - REFUSED == ({"input_examples"} if model is Tool else set())
    assert not REFUSED & set(model.model_fields)


def test_null_means_that_an_optional_field_is_absent() -> None:
    required = {"model", "max_tokens", "messages"}
    nulls = dict.fromkeys(set(MessagesRequest.model_fields) - required)
    assert translated(**nulls).request == translated().request


def test_a_request_as_agents_send_it() -> None:
    """All that a coding agent adds to its requests, as far as it is known, is accepted."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "additionalProperties": False, **SCHEMA}
    request = translated(
        max_tokens=32_000,
        temperature=1,
        stream=True,
        system=[{"type": "text", "text": "You are an agent."}, {"type": "text", "text": "Rules", **cached}],
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "<system-reminder/>"}, {"type": "text", "text": "hi", **cached}],
            }
        ],
        tools=[{**TOOL, "input_schema": schema, "eager_input_streaming": True}, {**TOOL, "name": "other", **cached}],
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "medium"},
        metadata={"user_id": '{"device_id": "' + "0" * 64 + '", "session_id": "' + "0" * 36 + '"}'},
    ).request
    assert request.max_tokens == CARD.context
    assert [message.role for message in request.messages or ()] == ["system", "user"]
    assert len(request.tools or ()) == 2
