"""Renders chat templates exactly as transformers does, without transformers.

A template is a program that comes with a model. It runs in Jinja's sandbox and only in a helper process, which has a
time limit and a memory limit. This module also limits the length of its output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

from jinja2 import Environment, Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Const, Name, Node, TemplateData
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS: Final = 64 * 2**20
"""Default limit of a rendered prompt: several times the largest request body."""
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Fields that may hold a message's reasoning; templates read the first one."""

_FINAL: Final = "END_OF_THE_FINAL_MESSAGE "
"""Put at the end of a message to find it in the output. The space shows whether the template removes white space."""


class OutputTooLong(Exception):
    """A template's output exceeds the limit."""


class CannotContinue(Exception):
    """The template's output does not contain the last message as it is, so that it cannot be left open."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a template uses.

    Attributes:
        variables: the names that it reads; some of them may be variables of its own.
        literals: all texts that it writes or compares with, separated by null characters.
    """

    source: str
    variables: frozenset[str]
    literals: str


@lru_cache(maxsize=32)
def features(source: str) -> Features | None:
    """Return what a template uses; None if it is not valid."""
    try:
        tree = _environment().parse(source)
    except TemplateError:
        return None
    texts = [node.data for node in tree.find_all(TemplateData)]
    texts += [node.value for node in tree.find_all(Const) if isinstance(node.value, str)]
    variables = frozenset(node.name for node in tree.find_all(Name) if node.ctx == "load")
    return Features(source, variables, "\0".join(texts))


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool,
    continue_final: bool = False,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """Render messages with a chat template.

    Args:
        continue_final: end the text with the content of the last message.

    Raises:
        ValueError: there are no messages.
        OutputTooLong: the text has more than `max_characters`.
        CannotContinue: the template changes or omits the content of the last message.
        jinja2.TemplateError: exactly this class, not a subclass, if the template itself rejects the messages.
        Exception: any other, because a template is a program.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if continue_final:
        if "content" not in source:
            raise CannotContinue
        messages = [*messages[:-1], _marked(messages[-1])]
    chunks, length = [], 0
    for chunk in _compiled(source).generate(
        messages=[_cleaned(message) for message in messages],
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **variables,
    ):
        chunks.append(chunk)
        length += len(chunk)
        if length > max_characters:
            raise OutputTooLong(f"more than {max_characters} characters")
    text = "".join(chunks)
    return _before_mark(text, messages[-1]) if continue_final else text


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put a mark at the end of a message's text; of several texts, at the end of the last one."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _FINAL}
    parts = [*(content or ())]
    for index in reversed(range(len(parts))):
        if "text" in parts[index]:
            parts[index] = {**parts[index], "text": parts[index]["text"] + _FINAL}
            return {**message, "content": parts}
    raise CannotContinue


def _before_mark(text: str, message: Mapping[str, Any]) -> str:
    content = message["content"]
    if not isinstance(content, str):
        content = next(part["text"] for part in reversed(content) if _FINAL in part.get("text", ""))
    if content.removesuffix(_FINAL).strip() not in text or _FINAL.strip() not in text:
        raise CannotContinue
    end = text.rindex(_FINAL.strip())
    return text[:end] if text.startswith(_FINAL, end) else text[:end].rstrip()


def _cleaned(message: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a message as transformers does: drop nulls, and set both names of its reasoning."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's text for training and has no effect on the output."""

    tags: Final = {"generation"}  # type: ignore[misc]  # a plain attribute in Jinja

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_called"), [], [], body).set_lineno(line)

    def _called(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` for templates, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named `self`, so that a template may use it as an attribute
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not have the attribute {name!r}")


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
