"""Renders chat templates exactly as transformers does, without transformers.

A template is a program that comes with a model. It runs in Jinja's sandbox and only in a helper process, which has a
time limit and a memory limit. This module also limits the length of its output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS: Final = 64 * 2**20
"""Default limit of a rendered prompt: several times the largest request body."""
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Fields that may hold a message's reasoning; templates read the first one."""


class OutputTooLong(Exception):
    """A template's output exceeds the limit."""


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """Render messages with a chat template.

    Raises:
        ValueError: there are no messages.
        OutputTooLong: the text has more than `max_characters`.
        jinja2.TemplateError: exactly this class, not a subclass, if the template itself rejects the messages.
        Exception: any other, because a template is a program.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    chunks, length = [], 0
    for chunk in _compiled(source).generate(
        messages=[_cleaned(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **variables,
    ):
        chunks.append(chunk)
        length += len(chunk)
        if length > max_characters:
            raise OutputTooLong(f"more than {max_characters} characters")
    return "".join(chunks)


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
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


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
