"""Chat templates, rendered as transformers renders them, without transformers.

A template is a program that came with a model. It runs in Jinja's sandbox and only in a helper process, whose time and
memory are bounded; here, the size of what it writes is bounded as well.
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

MOST_BYTES: Final = 64 * 2**20
"""Of rendered text: several times the largest request body."""
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; the first is the one that templates read."""


class TooMuchText(Exception):
    """A template writes more than it may."""


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    most_bytes: int = MOST_BYTES,
) -> str:
    """The text that a chat template makes of messages.

    Raises:
        ValueError: there are no messages.
        TooMuchText: it is longer than `most_bytes`.
        Exception: anything; a `jinja2.TemplateError` proper is what the template itself says.
    """
    if not messages:
        raise ValueError("a conversation without messages")
    pieces, size = [], 0
    for piece in _compiled(source).generate(
        messages=[_cleaned(message) for message in messages],
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **variables,
    ):
        pieces.append(piece)
        size += len(piece)
        if size > most_bytes:
            raise TooMuchText(f"more than {most_bytes} characters")
    return "".join(pieces)


def _cleaned(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to templates: without nulls, its reasoning under every name."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks for training what the assistant said; here it changes nothing."""

    tags: Final = {"generation"}  # type: ignore[misc]  # Jinja has a plain attribute

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_called"), [], [], body).set_lineno(line)

    def _called(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` for templates, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may call an attribute `self`
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
        raise SecurityError(f"a namespace has no attribute {name!r}")


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own, without escaping for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
