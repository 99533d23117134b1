"""How many tokens a prompt has, without MLX: so that one too long is refused before it waits in line.

Most prompts need no tokenizer: a token stands for at least one byte, so what has fewer bytes than the context has
tokens fits; and what has more bytes than a context full of the longest token is too long. Only the rest is counted,
beside the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import Invalid, JobFailure
from shared.jobs.request import Request
from shared.models.registry import ModelCard, Registry
from web.aside import aside

_SPECIALS: Final = 8
"""Tokens that a tokenizer may add of its own accord."""
_TURN: Final = 256
"""Bytes that take as long to render as a message does by itself."""


@dataclass(frozen=True, slots=True)
class _Counter:
    """A tokenizer.

    Attributes:
        longest: bytes of its longest token.
    """

    tokenizer: Any
    longest: int

    def count(self, text: str, *, add_special_tokens: bool) -> int:
        # Of all ways to encode, a batch alone lets go of the interpreter meanwhile.
        encode = partial(self.tokenizer.encode_batch_fast, [text], add_special_tokens=add_special_tokens)
        return len(aside(len(text), encode)[0])


class PromptSizer:
    """Tells prompts that fit a model from those that do not."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._counters: dict[str, _Counter] = {}

    def check(self, card: ModelCard, generation: Request, field: str) -> None:
        """Refuse a prompt that leaves no room for an answer; it came in `field`.

        Raises:
            Invalid: it is too long, or the model's template refuses the messages.
            redis.RedisError: Redis is away.
        """
        if not self._fits(card, generation):
            raise Invalid(
                f"The prompt is longer than the model's context of {card.context} tokens.",
                code=JobFailure.CONTEXT_LENGTH,
                field=field,
            )

    def _fits(self, card: ModelCard, generation: Request) -> bool:
        text, messages = generation.prompt, generation.messages
        if messages is not None:
            size = sum(len(_said(message["content"]).encode()) for message in messages)
            # A template adds to what was said. What it may drop, such as earlier thoughts, is not as much as this.
            if self._hopeless(card, size):
                return False
            text = aside(size + _TURN * len(messages), lambda: render(card, messages))
        if text is None:
            return True  # nobody here can tell: the worker will
        size = len(text.encode())
        if size + _SPECIALS < card.context:
            return True
        if self._hopeless(card, size):
            return False
        counter = self._counter(card)
        return counter is None or counter.count(text, add_special_tokens=messages is None) < card.context

    def _hopeless(self, card: ModelCard, size: int) -> bool:
        """Whether so many bytes are too long even if they were the longest token again and again."""
        if size <= card.context:
            return False
        counter = self._counter(card)
        return counter is not None and size > card.context * counter.longest

    def _counter(self, card: ModelCard) -> _Counter | None:
        if card.tokenizer is None:
            return None
        if card.tokenizer not in self._counters:
            text = self._registry.tokenizer_json(card.tokenizer)
            if text is None:
                return None
            self._counters[card.tokenizer] = aside(len(text), partial(_load, text))
        return self._counters[card.tokenizer]


def _said(content: Any) -> str:
    """The text of a message. How many tokens an image has only its model's worker can tell."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


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
