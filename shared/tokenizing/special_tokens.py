"""Tokenises special tokens in callers' texts as ordinary text: `<|im_end|>` in a message must not end the message.

Before the template renders a conversation, a break character is put into each special token in it, behind the token's
first character. So no template can write the token by accident, whatever it does with the text. After rendering, the
text is split at the tokens with a break character. They are tokenised without the tokenizer's special tokens,
and the texts between them as usual. Conversations without special tokens are not changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, Protocol

from shared.tokenizing.conversation import Conversation

_PRIVATE_USE: Final = (range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFE))
_REASONING: Final = re.compile(r"<[|/]*(longcat_)?think\b")
"""The markers of reasoning in an assistant message: templates split its content at them."""
_TRUSTED: Final = ("system", "developer", "assistant")
"""Roles whose texts may contain the markers of tool calls and reasoning: examples, and earlier answers."""
_MAX_CACHED: Final = 256
"""Maximum characters of a text between special tokens whose tokens are kept for its next occurrence."""


class Encoder(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Tokenise a text. Special tokens in it become tokens; no others are added."""
        ...

    def encode_as_text(self, text: str) -> Sequence[int]:
        """Tokenise a text without any special or added tokens."""
        ...


class NotText(Exception):
    """The tokenizer has no other tokens for a special token's text. The text is that token."""


@dataclass(frozen=True, slots=True)
class BrokenConversation:
    """A conversation with a break character in each special token."""

    conversation: Conversation
    character: str


class SpecialTokens:
    """The tokens that callers' texts must not contain.

    Args:
        special: texts of the tokenizer's special tokens.
        markers: texts of its other added tokens that the template uses, for example for tool calls.
    """

    def __init__(self, special: Iterable[str], markers: Iterable[str]) -> None:
        # A token of one character cannot be broken. There are none but white space and punctuation.
        self._special = sorted({token for token in special if len(token) > 1}, key=len, reverse=True)
        self._all = sorted({*self._special, *(token for token in markers if len(token) > 1)}, key=len, reverse=True)
        self._in_trusted = _any_of(token for token in self._special if not _REASONING.match(token))
        self._in_others = _any_of(self._all)

    def broken(self, conversation: Conversation) -> BrokenConversation | None:
        """Return a conversation without whole special tokens; None if it has none that must be broken."""
        if self._broken(conversation, chr(_PRIVATE_USE[0][0])) == conversation:
            return None
        character = _unused(conversation)
        return BrokenConversation(self._broken(conversation, character), character)

    def _broken(self, conversation: Conversation, character: str) -> Conversation:
        messages = [self._broken_message(message, character) for message in conversation.messages]
        rest = _Breaker(self._in_others, character)
        tools, variables = rest.value(conversation.tools), rest.value(conversation.variables)
        return replace(conversation, messages=messages, tools=tools, variables=variables)

    def _broken_message(self, message: dict[str, Any], character: str) -> dict[str, Any]:
        breaker = _Breaker(self._in_trusted if message["role"] in _TRUSTED else self._in_others, character)
        broken = {name: breaker.value(value) for name, value in message.items() if name not in ("role", "content")}
        content = message.get("content")
        if isinstance(content, list):
            broken["content"] = breaker.parts(content)
        elif content is not None:
            broken["content"] = breaker.text(content)
        return {name: broken.get(name, value) for name, value in message.items()}

    def encode(self, text: str, character: str, encoder: Encoder) -> list[int]:
        """Tokenise the text of a broken conversation.

        Raises:
            NotText: a special token's text cannot be tokenised as text.
        """
        text = text.replace(_escaped(character), character)
        broken = "|".join(re.escape(token[0] + character + token[1:]) for token in self._all)
        first, *pieces = re.split(f"({broken})|{character}", text)
        middle = _Middle(encoder)
        ids = [*encoder.encode(first)] if first else []
        for index, piece in enumerate(pieces):
            if piece:
                ids += middle.token(piece.replace(character, "")) if index % 2 == 0 else middle.text(piece)
        return ids


class _Breaker:
    """Puts a character into special tokens."""

    def __init__(self, tokens: re.Pattern[str], character: str) -> None:
        self._tokens = tokens
        self._character = character

    def text(self, text: str) -> str:
        return self._tokens.sub(lambda match: match[0][0] + self._character + match[0][1:], text)

    def value(self, value: Any) -> Any:
        """Return a JSON value with broken tokens in its texts, also in its names."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(name): self.value(member) for name, member in value.items()}
        return [self.value(member) for member in value] if isinstance(value, list | tuple) else value

    def parts(self, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the parts of a content. Templates may join them, so a token may be spread over several parts."""
        joined = "".join(part.get("text", "") for part in parts)
        positions = [match.start() + 1 for match in self._tokens.finditer(joined)]
        return [*self._insert(parts, iter(positions))] if positions else [*parts]

    def _insert(self, parts: Sequence[dict[str, Any]], positions: Iterator[int]) -> Iterator[dict[str, Any]]:
        start, position = 0, next(positions, None)
        for part in parts:
            text = part.get("text", "")
            pieces, begin = [], 0
            while position is not None and position <= start + len(text):
                pieces.append(text[begin : position - start])
                begin, position = position - start, next(positions, None)
            yield {**part, "text": self._character.join([*pieces, text[begin:]])} if pieces else part
            start += len(text)


class _Middle:
    """Tokenises texts from the middle of a prompt."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._newline = [*encoder.encode("\n")]
        self._texts: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        if len(text) > _MAX_CACHED:
            return self._ids(text, self._encoder.encode)
        if text not in self._texts:
            self._texts[text] = self._ids(text, self._encoder.encode)
        return self._texts[text]

    def token(self, token: str) -> list[int]:
        """Tokenise a special token's text as text."""
        if token not in self._tokens:
            self._tokens[token] = self._token(token)
        return self._tokens[token]

    def _token(self, token: str) -> list[int]:
        forbidden = self._encoder.encode(token)
        if len(forbidden) != 1:  # the tokenizer does not recognise it, not even alone
            return [*forbidden]
        ids = self._ids(token, self._encoder.encode_as_text)
        if forbidden[0] not in ids:
            return ids
        ids = self.text(token[0]) + self.text(token[1:])
        if forbidden[0] in ids:
            raise NotText(token)
        return ids

    def _ids(self, text: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
        # Many tokenizers put a space before a text, unless another text precedes it.
        ids = [*encode("\n" + text)]
        length = len(self._newline)
        return ids[length:] if ids[:length] == self._newline else [*encode(text)]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, which are sorted by length. Without tokens, it finds nothing."""
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _unused(conversation: Conversation) -> str:
    """Return a character that the conversation contains neither as it is nor escaped."""
    text = json.dumps([conversation.messages, conversation.tools, conversation.variables], ensure_ascii=False)
    used = set(text)
    candidates = (character for code in chain(*_PRIVATE_USE) if (character := chr(code)) not in used)
    return next(character for character in candidates if _escaped(character) not in text)


def _escaped(character: str) -> str:
    """Return a character as templates write it that restrict JSON to ASCII."""
    return json.dumps(character)[1:-1]
