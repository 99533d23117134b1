"""Translate requests of the Responses API to requests for jobs, and the fields that errors name back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from shared.jobs.record import Priority
from web.http.field_names import named_fields, renamed
from web.responses.conversation import INPUT, Conversation
from web.responses.items import Item, MessageItem
from web.responses.requests import (
    AllowedTools,
    CustomTool,
    FunctionTool,
    GrammarInput,
    JsonObject,
    JsonSchema,
    NamedTool,
    PlainText,
    PromptRequest,
    ResponseRequest,
    Tool,
)
from web.schemas.requests import JobRequest

_FIELDS: Final = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "messages": "input",
}
"""Fields of the Responses API, by the field of the job's request that they become. Longer names come first."""
_SAME: Final = ("enable_thinking", "thinking_budget", "chat_template_kwargs")
_NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Translated:
    """A request for a job.

    Attributes:
        paths: paths in the original request, by path in the job's request; see `original_fields`.
    """

    request: JobRequest
    paths: dict[str, str]


def input_items(request: PromptRequest) -> list[Item]:
    """Return the input as items. A text is a message of the user."""
    if not isinstance(request.input, str):
        return request.input
    return [MessageItem(role="user", content=request.input)] if request.input else []


def job_request(
    request: PromptRequest, items: Sequence[Item], history: Sequence[Item], highest: Priority
) -> Translated:
    """Return the job that generates a response.

    Args:
        items: the input, see `input_items`.
        history: input and output of the responses that this one continues.
        highest: the highest priority that the API key may use.

    Raises:
        Invalid: the request cannot be run; the field is one of the Responses API.
    """
    earlier = [("previous_response_id", item) for item in history]
    new = [("input" if isinstance(request.input, str) else f"input[{i}]", item) for i, item in enumerate(items)]
    conversation = Conversation(request.instructions, [*earlier, *new])
    tools = [(index, tool) for index, tool in enumerate(request.tools) if _is_allowed(tool, request)]
    paths = conversation.paths | _tool_paths(tools)
    fields: dict[str, Any] = {name: getattr(request, name) for name in ("model", "adapter")}
    fields |= {"messages": conversation.messages, "parse": "message"}
    fields |= _tool_fields(request, [tool for _, tool in tools]) | _text_fields(request)
    if request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if isinstance(request, ResponseRequest):
        fields |= _generation_fields(request, highest)
    with original_fields(paths):
        return Translated(JobRequest.model_validate(fields), paths)


def _is_allowed(tool: Tool, request: PromptRequest) -> bool:
    choice = request.tool_choice
    return not isinstance(choice, AllowedTools) or any(
        (each.type, each.name) == (tool.type, tool.name) for each in choice.tools
    )


def _tool_paths(tools: Sequence[tuple[int, Tool]]) -> dict[str, str]:
    """Return the paths of tools, which have their index in the request, by their path in the job's request."""
    paths: dict[str, str] = {}
    for number, (index, tool) in enumerate(tools):
        paths[f"tools[{number}]"] = f"tools[{index}]"
        if isinstance(tool, CustomTool):
            for name in ("grammar", "parameters"):
                paths[f"tools[{number}].function.{name}"] = f"tools[{index}].format.definition"
    return paths


def _tool_fields(request: PromptRequest, tools: Sequence[Tool]) -> dict[str, Any]:
    if not tools:
        return {}
    choice = request.tool_choice
    fields: dict[str, Any] = {
        "tools": [_function(tool) for tool in tools],
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls,
    }
    if isinstance(choice, NamedTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif isinstance(choice, AllowedTools):
        fields["tool_choice"] = choice.mode
    return fields


def _function(tool: Tool) -> dict[str, Any]:
    if isinstance(tool, FunctionTool):
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or _NO_PARAMETERS}
        if tool.strict:
            function["strict"] = True
    else:
        function = {"name": tool.name, **_custom_parameters(tool)}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _custom_parameters(tool: CustomTool) -> dict[str, Any]:
    """Return the parameters of the function that stands for a custom tool: one text."""
    text: dict[str, Any] = {"type": "string", "description": "The input of the tool, as plain text"}
    grammar = tool.format if isinstance(tool.format, GrammarInput) else None
    if grammar is not None and grammar.syntax == "regex":
        text["pattern"] = f"^(?:{grammar.definition})$"
    schema = {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
    if grammar is None:
        return {"parameters": schema}
    by_grammar = {"grammar": grammar.definition} if grammar.syntax == "lark" else {}
    return {"parameters": schema, "strict": True, **by_grammar}


def _text_fields(request: PromptRequest) -> dict[str, Any]:
    match request.text.format:
        case PlainText():
            return {}
        case JsonObject():
            return {"response_format": {"type": "json_object"}}
        case JsonSchema(schema_=schema):
            response = {"name": "output", "schema": schema, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": response}}


def _generation_fields(request: ResponseRequest, highest: Priority) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(request, name) for name in _SAME if name in request.model_fields_set}
    if request.max_output_tokens is not None:
        fields["max_tokens"] = request.max_output_tokens
    if request.logprobs is not None:
        fields["logprobs"] = request.logprobs
    return {**fields, **request.sampling_fields(highest)}


@contextmanager
def original_fields(paths: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the fields of the Responses API instead of those of the job's request.

    Args:
        paths: `Translated.paths`.
    """
    with named_fields(lambda field: _api_field(field, paths)):
        yield


def _api_field(field: str, paths: Mapping[str, str]) -> str:
    """Return the field of the Responses API that a field of the job's request comes from."""
    keys = [key for key in paths if field == key or field.startswith((f"{key}.", f"{key}["))]
    if not keys:
        return renamed(field, _FIELDS)
    key = max(keys, key=len)
    if field.startswith("tools["):
        return paths[key] + field.removeprefix(key).replace(".function", "", 1)
    arguments = field.endswith(".function.arguments") and paths[key] != "previous_response_id"
    return f"{paths[key]}.arguments" if arguments else paths[key]
