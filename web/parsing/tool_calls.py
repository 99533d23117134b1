"""Find function calls in the text of a model, in the two forms that GUI models use.

As tags (UI-TARS 2, Qwen3.5):

    <tool_call><function=computer_use><parameter=action>left_click</parameter></function></tool_call>

As JSON (Qwen2.5-VL, Qwen3-VL):

    <tool_call>{"name": "computer_use", "arguments": {"action": "left_click"}}</tool_call>

A model can write anything, so every search starts where the last one ended: parsing takes time linear in the length of
the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from web.parsing.actions import ParseError, shortened
from web.parsing.ui_tars_calls import thought_in

_FUNCTION: Final = re.compile(r"<function=([^<>\s]{1,64})>")
_FUNCTION_END: Final = re.compile(r"\s*+</function>")
_PARAMETER: Final = re.compile(r"\s*+<parameter=([^<>\s]{1,64})>")
_PARAMETER_END: Final = "</parameter>"
_OBJECT: Final = re.compile(r'\{\s*+"(?:name|arguments)"')
_MARKUP: Final = re.compile(r"</?(?:gui_think|think|seed:think|seed:tool_call|tool_call)>|```(?:json)?")


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call of a function. In the form with tags, the values of arguments are texts."""

    name: str
    arguments: dict[str, Any]
    thought: str | None
    raw: str


def is_tagged(text: str) -> bool:
    """Whether a text has a function call as tags."""
    return _FUNCTION.search(text) is not None


def tagged_calls(text: str) -> Iterator[FunctionCall]:
    """Yield the calls in the form with tags, in order.

    Raises:
        ParseError: a call is malformed or incomplete.
    """
    thought, position = None, 0
    while opening := _FUNCTION.search(text, position):
        thought = _thought(text[position : opening.start()]) or thought
        arguments, end = _tagged_arguments(text, opening)
        yield FunctionCall(opening[1], arguments, thought, text[opening.start() : end])
        position = end


def _tagged_arguments(text: str, opening: re.Match[str]) -> tuple[dict[str, str], int]:
    """Return the arguments of a call and the position of its end."""
    arguments: dict[str, str] = {}
    position = opening.end()
    while parameter := _PARAMETER.match(text, position):
        end = text.find(_PARAMETER_END, parameter.end())
        if end < 0:
            raise ParseError(f"The argument {parameter[1]} of {shortened(opening[1])} is incomplete.")
        arguments.setdefault(parameter[1], _without_line_breaks(text[parameter.end() : end]))
        position = end + len(_PARAMETER_END)
    closing = _FUNCTION_END.match(text, position)
    if closing is None:
        raise ParseError(f"The arguments of {shortened(opening[1])} are malformed or incomplete.")
    return arguments, closing.end()


def _without_line_breaks(value: str) -> str:
    """Remove the line breaks between the tags and a value on lines of its own. Others belong to the value."""
    return value[1:].removesuffix("\n") if value.startswith("\n") else value


def json_calls(text: str) -> Iterator[FunctionCall]:
    """Yield the calls in the form of JSON, in order.

    Raises:
        ParseError: a call is malformed or incomplete.
    """
    thought, end = None, 0
    while opening := _OBJECT.search(text, end):
        thought = _thought(text[end : opening.start()]) or thought
        call, end = decode(text, opening.start())
        name, arguments = call.get("name"), call.get("arguments")
        if isinstance(arguments, str):  # OpenAI's form
            arguments, _ = decode(arguments, 0)
        raw = text[opening.start() : end]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ParseError(f"A call needs a name and arguments: {shortened(raw)}.")
        yield FunctionCall(name, arguments, thought, raw)


def decode(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Decode the JSON object at a position; return it and the position of its end.

    Raises:
        ParseError: there is no valid object.
    """
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        raise ParseError(f"The JSON is malformed or incomplete: {shortened(text[start : start + 61])}.") from None
    if not isinstance(value, dict):
        raise ParseError(f"The JSON is not an object: {shortened(text[start : start + 61])}.")
    return value, end


def _thought(before: str) -> str | None:
    """Return the thought in the text before a call; None if that is only punctuation."""
    thought = thought_in(_MARKUP.sub("", before), allow_unlabeled=True)
    return thought if thought and any(map(str.isalnum, thought)) else None
