"""Tools for models without a known format of tool calls: the system message explains one.

The chat template of such a model either ignores tools, or demands a format that no parser reads. The format here is the
most common one: JSON between `<tool_call>` and `</tool_call>`, which mlx-lm's parser `json_tools` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

FORMAT: Final = "generic"
"""`ModelCard.tool_format` of such models."""
START: Final = "<tool_call>"
END: Final = "</tool_call>"
_EXPLANATION: Final = (
    "You can call functions. These are the functions, one JSON object per line:\n{functions}\n\n"
    "To call a function, write one line for each call, and nothing after the last one:\n"
    f'{START}{{{{"name": {{name}}, "arguments": {{{{"parameter": "value"}}}}}}}}{END}\n'
    "The next message has the results. If no function is needed, answer in plain text."
)


def explained(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[Mapping[str, Any]]:
    """Return the messages with tools, calls and results as text, for a chat template that knows none of them."""
    converted: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            _add_result(converted, _result(message))
        elif message.get("tool_calls"):
            text = [message["content"]] if message.get("content") else []
            calls = [_call(call["function"]) for call in message["tool_calls"]]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            converted.append({**rest, "content": "\n".join([*text, *calls])})
        else:
            converted.append(message)
    return _with_system_text(converted, _explanation(tools)) if tools else converted


def _explanation(tools: Sequence[Mapping[str, Any]]) -> str:
    functions = [tool["function"] for tool in tools]
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    return _EXPLANATION.format(functions=lines, name=json.dumps(functions[0]["name"]))


def _with_system_text(messages: list[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """Append a text to the first message if that is a system message, else add such a message."""
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    first = messages[0]
    if isinstance(first["content"], str):
        content: Any = f"{first['content']}\n\n{text}"
    else:
        content = [*first["content"], {"type": "text", "text": text}]
    return [{**first, "content": content}, *messages[1:]]


def _call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": json.loads(function["arguments"])}
    return f"{START}{json.dumps(call, ensure_ascii=False)}{END}"


def _result(message: Mapping[str, Any]) -> str:
    name = f' name="{message["name"]}"' if message.get("name") else ""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content)
    return f"<tool_response{name}>\n{text}\n</tool_response>"


def _add_result(messages: list[Mapping[str, Any]], text: str) -> None:
    """Add a result as a user message. Results of one turn share a message: many templates demand alternating roles."""
    previous = messages[-1] if messages else {}
    if previous.get("role") == "user" and str(previous.get("content")).startswith("<tool_response"):
        messages[-1] = {**previous, "content": f"{previous['content']}\n{text}"}
    else:
        messages.append({"role": "user", "content": text})
