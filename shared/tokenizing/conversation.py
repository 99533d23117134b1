"""The input of a chat template: a request's messages, tools and variables, as the model's template expects them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shared.tokenizing import generic_tools
from shared.tokenizing.chat_template import Features
from shared.tokenizing.messages import RESERVED_VARIABLES


class UnsupportedField(Exception):
    """The template does not support what a request field demands."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a chat template.

    Attributes:
        messages: in transformers' format. Arguments of tool calls are objects.
        tools: functions in OpenAI's format; None for none.
        variables: variables of the template that the request or the catalog sets.
        add_generation_prompt: whether the prompt ends with the beginning of an answer.
        continue_final: whether the last message stays open, so that the answer continues it.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final: bool = False

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The functions of all tool calls, with name and arguments."""
        return [call["function"] for message in self.messages for call in message.get("tool_calls") or ()]

    def first_message(self) -> Conversation:
        """Return the same conversation with only its first message, closed."""
        return replace(self, messages=self.messages[:1], add_generation_prompt=False, continue_final=False)

    def with_messages(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Conversation:
        """Return the same conversation with changed messages."""
        return replace(self, messages=[change(message) for message in self.messages])

    def with_text_arguments(self) -> Conversation:
        """Return the same conversation with arguments of tool calls as JSON text, for templates that print them."""
        return self.with_messages(_with_text_arguments)

    def with_empty_contents(self) -> Conversation:
        """Return the same conversation with an empty text in place of an absent content, for templates that read it."""
        return self.with_messages(lambda message: {**message, "content": message.get("content") or ""})


def conversation_of(
    request: Mapping[str, Any], features: Features | None, *, reasons: bool, explain_tools: bool = False
) -> Conversation:
    """Return the input of the template for a request.

    Args:
        request: `shared.tokenizing.messages.request_fields`.
        features: what the template uses; None if that is unknown, because it is no Jinja template.
        reasons: whether the model reasons by default.
        explain_tools: whether the system message explains tools, because the model has no known format for them.

    Raises:
        UnsupportedField: the template does not support a field.
    """
    messages = request["messages"] or [{"role": "user", "content": request["prompt"]}]
    tools = [*request["tools"]] if request.get("tools") else None
    if explain_tools:
        messages, tools = generic_tools.explained(_with_names(messages), tools), None
    variables = dict(request.get("template_variables") or {})
    if features is not None:
        _check_tools(messages, tools, features)
        variables = _variables(variables, features.variables, reasons)
        if "developer" not in features.source:
            messages = _without_developer(messages)
    for name in RESERVED_VARIABLES & variables.keys():
        raise UnsupportedField(f"chat_template_kwargs.{name}", f"{name} cannot be a variable of the chat template.")
    continue_final = bool(request.get("continue_final"))
    prepared = [_prepared(message) for message in _with_names(messages)]
    return Conversation(prepared, tools, variables, not continue_final, continue_final)


def _check_tools(messages: Sequence[Mapping[str, Any]], tools: object, features: Features) -> None:
    if tools and "tools" not in features.variables:
        raise UnsupportedField("tools", "This model's chat template does not support tools.")
    has_calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if has_calls and "tool" not in features.source:
        raise UnsupportedField("messages", "This model's chat template does not support tool calls and their results.")


def _variables(variables: dict[str, Any], known: Collection[str], reasons: bool) -> dict[str, Any]:
    """Return the variables under the names that the template uses."""
    switch = next((name for name in ("enable_thinking", "thinking") if name in known), None)
    if "reasoning_effort" not in known and (effort := variables.pop("reasoning_effort", None)) and switch:
        variables.setdefault("enable_thinking", effort != "none")
    if "enable_thinking" in variables and switch != "enable_thinking":
        enabled = variables.pop("enable_thinking")
        if switch is not None:
            variables.setdefault(switch, enabled)
        elif enabled != (reasons or "reasoning_effort" in known):
            problem = "always reasons" if reasons or "reasoning_effort" in known else "does not reason"
            raise UnsupportedField(
                "enable_thinking", f"enable_thinking cannot be {_json(enabled)}: this model {problem}."
            )
    for name in variables:
        if name not in known:
            message = f"This model's chat template has no variable {name}."
            raise UnsupportedField(f"chat_template_kwargs.{name}", message)
    return variables


def _without_developer(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Convert messages of the developer to system messages, and join one to a system message directly before it."""
    converted: list[Mapping[str, Any]] = []
    texts: list[str] = []  # of the last system message; joined at its end, because each join copies everything
    for message in messages:
        is_developer, content = message["role"] == "developer", message.get("content")
        if is_developer and texts and isinstance(content, str):
            texts.append(content)
            continue
        _join_last(converted, texts)
        converted.append({**message, "role": "system"} if is_developer else message)
        texts = [content] if converted[-1]["role"] == "system" and isinstance(content, str) else []
    _join_last(converted, texts)
    return converted


def _join_last(messages: list[Mapping[str, Any]], texts: Sequence[str]) -> None:
    if len(texts) > 1:
        messages[-1] = {**messages[-1], "content": "\n\n".join(texts)}


def _with_names(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Add the function's name to the results of tool calls, because some templates print it."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    return [
        {"name": names[message["tool_call_id"]], **message} if message.get("tool_call_id") in names else message
        for message in messages
    ]


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a stored message for the template: no nulls, images without properties, arguments as objects."""
    prepared = {name: value for name, value in message.items() if value is not None}
    content = prepared.get("content")
    if isinstance(content, list):  # of an image, templates use only the type
        prepared["content"] = [{"type": "image"} if part.get("type") == "image" else part for part in content]
    if calls := prepared.get("tool_calls"):
        prepared["tool_calls"] = [_with_arguments(call, _parsed) for call in calls]
    return prepared


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_arguments(call, _json) for call in message["tool_calls"]]}


def _with_arguments(call: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": convert(function["arguments"])}}


def _parsed(arguments: str) -> Any:
    return json.loads(arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
