"""How many tokens a prompt has, without MLX: so that one too long is refused before it waits in line.

Most prompts need no tokenizer: a token stands for at least one byte, so what has fewer bytes than the context has
tokens fits. Only the rest is counted, in a thread of its own, because counting is heavy and would hold every
stream of the process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

import gevent
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import Invalid, JobFailure
from shared.jobs import Generation
from shared.registry import ModelCard, Registry

_SPECIALS: Final = 8
"""Tokens that a tokenizer may add of its own accord."""


@dataclass(frozen=True, slots=True)
class _Counter:
    """A tokenizer.

    Attributes:
        longest: bytes of its longest token.
    """

    tokenizer: Any
    longest: int

    def count(self, text: str, *, add_special_tokens: bool) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


class PromptSizer:
    """Tells prompts that fit a model from those that do not."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._counters: dict[str, _Counter] = {}

    def check(self, card: ModelCard, generation: Generation, field: str) -> None:
        """Refuse a prompt that leaves no room for an answer; it came in `field`.

        Raises:
            Invalid: it is too long, or the model's template refuses the messages.
            redis.RedisError: Redis is away.
        """
        messages = generation.messages
        text = generation.prompt if messages is None else render(card, messages)
        # Without a text nobody here can tell: the worker will.
        if text is not None and not self._fits(card, text, add_special_tokens=messages is None):
            raise Invalid(
                f"The prompt is longer than the model's context of {card.context} tokens.",
                code=JobFailure.CONTEXT_LENGTH,
                field=field,
            )

    def _fits(self, card: ModelCard, text: str, *, add_special_tokens: bool) -> bool:
        size = len(text.encode())
        if size + _SPECIALS < card.context:
            return True
        counter = self._counter(card)
        if counter is None:
            return True
        if size > card.context * counter.longest:
            return False  # not even if it were the longest token again and again
        counted = gevent.get_hub().threadpool.apply(counter.count, (text,), {"add_special_tokens": add_special_tokens})
        return bool(counted < card.context)

    def _counter(self, card: ModelCard) -> _Counter | None:
        if card.tokenizer is None:
            return None
        if card.tokenizer not in self._counters:
            text = self._registry.tokenizer_json(card.tokenizer)
            if text is None:
                return None
            self._counters[card.tokenizer] = gevent.get_hub().threadpool.apply(_load, (text,))
        return self._counters[card.tokenizer]


class _Refused(Exception):
    """A template called `raise_exception`."""


def render(card: ModelCard, messages: Sequence[dict[str, Any]]) -> str | None:
    """The prompt that the model's chat template makes of messages; None when it cannot be rendered here.

    Raises:
        Invalid: the template refuses them.
    """
    if card.chat_template is None:
        return None
    try:
        return _template(card.chat_template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            bos_token=card.bos_token or "",
            eos_token=card.eos_token or "",
        )
    except _Refused as refused:
        raise Invalid(
            f"The model's chat template refuses these messages: {refused}",
            code=JobFailure.TEMPLATE,
            field="messages",
        ) from refused
    except (TemplateError, TypeError, LookupError, ValueError, ArithmeticError):
        return None


@lru_cache(maxsize=32)
def _template(source: str) -> Template:
    """The template in the environment that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    # Unlike Jinja's own, without escaping for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _load(text: str) -> _Counter:
    from tokenizers import Tokenizer  # heavy, and most processes never count

    tokenizer = Tokenizer.from_str(text)
    longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)
    return _Counter(tokenizer, longest)
