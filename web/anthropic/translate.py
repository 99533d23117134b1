"""Translate requests of the Messages API to requests for jobs, and the fields that errors name back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

from shared.models.registry import ModelCard
from web.anthropic.conversation import Conversation
from web.anthropic.schemas import (
    CountRequest,
    MessagesRequest,
    NoChoice,
    ThinkingDisabled,
    ThinkingEnabled,
    Tool,
    ToolChoice,
)
from web.http.field_names import named_fields, renamed
from web.schemas.requests import JobRequest

ThinkingShown = Literal["all", "omitted", "none"]
"""Whether an answer has thinking blocks with text, without text, or none."""

_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_FIELDS: Final = {
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_budget": "thinking.budget_tokens",
    "enable_thinking": "thinking",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "metadata": "metadata.user_id",
    "continue_final_message": "messages",
}
"""Fields of the Messages API, by the field of the job's request that they become. Longer names come first."""


def thinking_shown(request: CountRequest) -> ThinkingShown:
    """Return how thinking blocks appear. Without `thinking`, clients take the first block for the text."""
    thinking = request.thinking
    if thinking is None or isinstance(thinking, ThinkingDisabled):
        return "none"
    return "omitted" if thinking.display == "omitted" else "all"


@dataclass(frozen=True, slots=True)
class Translated:
    """A request for a job.

    Attributes:
        paths: paths of the messages' parts in the original request; see `original_fields`.
    """

    request: JobRequest
    paths: dict[str, str]


def job_request(request: CountRequest, card: ModelCard | None) -> Translated:
    """Return the job that answers a request.

    Args:
        card: the model's; None if no worker has announced the model.

    Raises:
        Invalid: the request cannot be run; the field is one of the Messages API.
    """
    conversation = Conversation(request)
    fields: dict[str, Any] = {name: getattr(request, name) for name in ("model", "adapter")}
    fields |= {"messages": conversation.messages, "parse": "message"}
    if conversation.continues:
        fields["continue_final_message"] = True
    fields |= _tool_fields(request) | _thinking_fields(request, card)
    if request.output_config and request.output_config.format:
        schema = request.output_config.format.schema_
        response = {"name": "output", "schema": schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": response}
    if isinstance(request, MessagesRequest):
        fields |= _generation_fields(request, card)
    with original_fields(conversation.paths):
        return Translated(JobRequest.model_validate(fields), conversation.paths)


def _generation_fields(request: MessagesRequest, card: ModelCard | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        # Clients send their model's usual maximum, whatever the context of this one.
        "max_tokens": min(request.max_tokens, card.context) if card else request.max_tokens,
        "stop": request.stop_sequences,
    }
    fields |= {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
    if request.metadata and request.metadata.user_id:
        fields["metadata"] = {"user_id": request.metadata.user_id}
    return fields


def _tool_fields(request: CountRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.tools:
        fields["tools"] = [_function(tool) for tool in request.tools]
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None and (request.tools or choice.type == "any"):
        fields["tool_choice"] = _CHOICES[choice.type]
    if choice is not None and not isinstance(choice, NoChoice) and choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _function(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _thinking_fields(request: CountRequest, card: ModelCard | None) -> dict[str, Any]:
    """Return the fields about thinking.

    Agents ask for thinking whatever the model is. A model that does not think satisfies every budget.
    """
    shown = thinking_shown(request) != "none"
    thinks = card is None or card.reasoning is not False
    fields: dict[str, Any] = {"enable_thinking": shown} if thinks or not shown else {}
    if isinstance(request.thinking, ThinkingEnabled) and thinks:
        fields["thinking_budget"] = request.thinking.budget_tokens
    if request.output_config and request.output_config.effort:
        fields["reasoning_effort"] = request.output_config.effort
    return fields


@contextmanager
def original_fields(paths: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the fields of the Messages API instead of those of the job's request.

    Args:
        paths: `Conversation.paths`.
    """
    with named_fields(lambda field: _api_field(field, paths)):
        yield


def _api_field(field: str, paths: Mapping[str, str]) -> str:
    """Return the field of the Messages API that a field of the job's request comes from."""
    if field.startswith("messages["):
        keys = [key for key in paths if field == key or field.startswith((f"{key}.", f"{key}["))]
        return paths[max(keys, key=len)] if keys else field
    if field.startswith("tools["):
        return field.replace(".function", "", 1).replace(".parameters", ".input_schema", 1)
    return renamed(field, _FIELDS)
