"""The grammar of a whole answer: the request's constraint, and tool calls whose arguments satisfy their schemas.

The arguments of a call are JSON in every format. Formats that write them otherwise accept a JSON object with `name` and
`arguments` between their markers as well (`worker.output.tool_calls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from shared.constraints.grammar import compile_constraint, compile_schema
from shared.constraints.parts import is_strict, takes_text
from shared.jobs.request import Constraint, Request
from worker.output.format import MessageFormat
from worker.output.tool_calls import ToolFormat
from worker.runner.logits.thinking import is_harmony

Marker = Callable[[str], str]
"""Returns the Lark expression of a marker, whose special tokens are not text for llguidance."""

MAX_CALLS: Final = 32
"""Maximum tool calls per answer. Without a limit, a model that repeats itself would never end."""
_MAX_ANALYSES: Final = 8
_ANY_OBJECT: Final = '{"type": "object"}'
_LINE: Final = "\n"
_NO_ARGUMENTS: Final = '{"type": "object", "properties": {}, "additionalProperties": false}'


class _Call(NamedTuple):
    """A function that an answer may call.

    Attributes:
        arguments: name of the grammar of its arguments.
        is_text: whether they are a text, which follows the call's name as it is.
    """

    name: str
    arguments: str
    grammar: dict[str, Any]
    is_text: bool = False


class _Section(NamedTuple):
    """How a format writes a section with calls, as Lark expressions.

    Attributes:
        call: returns the expression of a call, the rule `one`.
        rest: what follows the section's start marker.
        repeats: whether each call has a section of its own.
    """

    call: Callable[[_Call], str]
    rest: str
    repeats: bool = False


def answer_grammar(request: Request, form: MessageFormat, marker: Marker) -> str | None:
    """Return the grammar of a request's answer in llguidance's format; None if any text is allowed.

    Raises:
        ConstraintRefused: the constraint or a schema is malformed.
    """
    own = None if request.constraint is None else compile_constraint(request.constraint)
    calls = _calls(request) if form.tool is not None else []
    must_call = request.tool_choice not in ("auto", "none")
    if is_harmony(form):
        return _channels(own, calls, marker, must_call=must_call) if own or calls else None
    if form.tool is None or not calls:
        return own
    single = request.tool_choice.startswith("function:") or not request.parallel_tool_calls
    most = 1 if single else MAX_CALLS
    section = _section(form.tool, marker, most)
    start = marker(form.tool.start)
    rules = _call_rules(section, start, calls, most)
    if must_call:
        return _composed(f"start: calls\n{rules}", calls)
    if own is not None:
        return _composed(f"start: @answer | calls\n{rules}", calls, own)
    if start.startswith("<"):  # a special token, which is not text for llguidance
        return _composed(f"start: TEXT? calls? TEXT?\nTEXT: /(.|\\n)+/\n{rules}", calls)
    return _composed(f"{_text_before(form.tool.start, most)}\n{rules}", calls)


def _calls(request: Request) -> list[_Call]:
    """Return the functions that the grammar has to describe; none if the answer may have any form."""
    functions = [tool["function"] for tool in request.tools or ()]
    choice = request.tool_choice
    if choice == "none" or (choice == "auto" and not (request.constraint or any(map(is_strict, functions)))):
        return []
    name = choice.removeprefix("function:")
    allowed = [each for each in functions if choice in ("auto", "required") or each["name"] == name]
    return [_call(index, function, choice) for index, function in enumerate(allowed)]


def _call(index: int, function: Mapping[str, Any], choice: str) -> _Call:
    name = f"args_{index}"
    if takes_text(function):
        text = compile_constraint(Constraint("grammar", function["grammar"]))
        return _Call(function["name"], name, _named(name, text), is_text=True)
    schema = _ANY_OBJECT
    if choice != "auto" or is_strict(function):
        parameters = function.get("parameters")
        schema = _NO_ARGUMENTS if parameters is None else json.dumps({"type": "object", **parameters})
    return _Call(function["name"], name, _named(name, compile_schema(schema)))


def _section(form: ToolFormat, marker: Marker, most: int) -> _Section:
    end = marker(form.end) if form.end else ""
    match form.name:
        case "mistral":
            more = _repeated('", " one', most - 1)
            return _Section(_json_call, f'"[" one {more} "]"')
        case "kimi_k2":
            return _Section(lambda call: _kimi_k2_call(call, marker), f"one{{1,{most}}} {end}")
        case "kimi_k3":
            return _Section(lambda call: _kimi_k3_call(call, marker), f"one{{1,{most}}} {end}")
        case _:
            return _Section(_json_call, f'"\\n" one "\\n"? {end}', repeats=True)


def _json_call(call: _Call) -> str:
    if call.is_text:
        return f"{json.dumps(json.dumps({'name': call.name}) + _LINE)} @{call.arguments}"
    head = f'{{"name": {json.dumps(call.name)}, "arguments": '
    return f'{json.dumps(head)} @{call.arguments} "}}"'


def _kimi_k2_call(call: _Call, marker: Marker) -> str:
    head = f'{marker("<|tool_call_begin|>")} "functions.{call.name}:" INDEX {marker("<|tool_call_argument_begin|>")}'
    return f"{head} @{call.arguments} {marker('<|tool_call_end|>')}"


def _kimi_k3_call(call: _Call, marker: Marker) -> str:
    name = marker(f'<|open|>call tool="{call.name}" index="')
    arguments = marker('"<|sep|><|open|>json type="object"<|sep|>')
    return f"{name} INDEX {arguments} @{call.arguments} {marker('<|close|>json<|sep|><|close|>call<|sep|>')}"


def _call_rules(section: _Section, start: str, calls: Sequence[_Call], most: int) -> str:
    """Return the rule `calls`, and those that it needs."""
    one = " | ".join(map(section.call, calls))
    more = _repeated(f'"\\n" {start} rest', most - 1) if section.repeats else ""
    return f"calls: {start} rest {more}\nrest: {section.rest}\none: {one}\nINDEX: /[0-9]{{1,2}}/"


def _repeated(expression: str, most: int) -> str:
    return f"({expression}){{0,{most}}}" if most else ""


def _text_before(start: str, most: int) -> str:
    """Return the rule `start` of text and calls, if the start marker is text: wherever it occurs, a call begins."""
    marker = re.escape(start).replace("/", r"\/")
    tail = rf"TAIL: /(.|\n)+/ & ~/(.|\n)*{marker}(.|\n)*/"
    return f"start: (before rest){{0,{most}}} TAIL?\nbefore[lazy]: /(.|\\n)*{marker}/\n{tail}"


def _channels(own: str | None, calls: Sequence[_Call], marker: Marker, *, must_call: bool) -> str:
    """Return the grammar of an answer in gpt-oss's channels: reasoning, then the final message or a call."""
    message = marker("<|message|>")
    analysis = f"{marker('<|channel|>analysis<|message|>')} TEXT {marker('<|end|><|start|>assistant')}"
    final = f"{marker('<|channel|>final<|message|>')} {'@answer' if own else 'TEXT'}"
    constrain = f'{marker("<|constrain|>")} "json"'
    one = [
        f"{marker(f'<|channel|>commentary to=functions.{call.name} ')} {'' if call.is_text else constrain} {message} "
        f"@{call.arguments}"
        for call in calls
    ]
    ending = " | ".join([*one, *([] if must_call else [final])])
    lark = f"start: ({analysis}){{0,{_MAX_ANALYSES}}} ({ending})\nTEXT: /(.|\\n)*/"
    return _composed(lark, calls, own)


def _composed(lark: str, calls: Sequence[_Call], own: str | None = None) -> str:
    """Return a grammar that refers to the grammars of arguments and to the request's own one, `answer`."""
    parts = [{"name": "start", "lark_grammar": lark}, *(call.grammar for call in calls)]
    return json.dumps({"grammars": [*parts, *([] if own is None else [_named("answer", own)])]})


def _named(name: str, grammar: str) -> dict[str, Any]:
    return {**json.loads(grammar)["grammars"][0], "name": name}
