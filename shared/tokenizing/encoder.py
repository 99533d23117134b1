"""From a request to token ids: templates and tokenizers as a helper process uses them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer

from shared.errors import JobFailure
from shared.tokenizing import chat_template
from shared.tokenizing.messages import TokenizerFault, TokenizerSource, digest

MOST_FILE: Final = 256 * 2**20
"""Bytes of a `tokenizer.json`; the largest known have 35 MB."""
_MOST_SAID: Final = 1000
"""Maximum characters of a template's own error message."""
_HEAD: Final = 6
"""Characters per token of the context in the first part of a very long text. Most tokens have fewer characters, so a
text that is far too long is rejected after its first part: each MB of text takes 0.7 s and 170 MB of memory."""
_MARGIN: Final = 1.05
"""The first part of a text may have a few more tokens alone than as part of the whole."""


class Refusal(Exception):
    """A request that cannot be tokenised: `code` is a `JobFailure` or a `TokenizerFault`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TooLong(Exception):
    """A prompt longer than it may be; `tokens` has its length, where that was counted."""

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class ChatTokenizer(Protocol):
    """A model's tokenizer and chat template.

    Both methods raise `TooLong` when they can tell early that there are more tokens than `most_tokens`.
    """

    def plain(self, text: str, most_tokens: int | None) -> Sequence[int]:
        """Ids of a text, with the special tokens that the tokenizer adds; a text that has the first gets no second."""
        ...

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, most_tokens: int | None = None
    ) -> Sequence[int]:
        """Ids of what the template makes of messages, one for each image. Raises anything."""
        ...

    @property
    def has_template(self) -> bool:
        """Whether it knows what to make of messages."""
        ...


class FileTokenizer:
    """The tokenizer of a `tokenizer.json` and a template: no model library is needed."""

    def __init__(self, source: TokenizerSource, tokenizer: Tokenizer) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, source: TokenizerSource) -> FileTokenizer:
        """Read the source's file.

        Raises:
            Refusal: it is not there, not the right one, or no tokenizer.
        """
        text = _read(Path(source.path))
        if source.digest and digest(text) != source.digest:
            raise Refusal(TokenizerFault.CORRUPT, "the tokenizer's file has another content")
        try:
            return cls(source, Tokenizer.from_str(text))
        except BaseException as error:  # the library raises nothing more precise, and panics
            raise Refusal(TokenizerFault.UNUSABLE, f"the tokenizer cannot be loaded: {error}") from error

    @property
    def has_template(self) -> bool:
        """See `ChatTokenizer`."""
        return self._source.chat_template is not None

    def plain(self, text: str, most_tokens: int | None) -> Sequence[int]:
        """See `ChatTokenizer`."""
        bos = self._source.bos_token
        return self._encode(text, bos is None or not text.startswith(bos), most_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, most_tokens: int | None = None
    ) -> Sequence[int]:
        """See `ChatTokenizer`."""
        source = self._source
        if source.chat_template is None:
            raise ValueError("no template")
        text = chat_template.render(
            source.chat_template, messages, source.variables, add_generation_prompt=add_generation_prompt
        )
        return self._encode(text, False, most_tokens)

    def _encode(self, text: str, add_special_tokens: bool, most_tokens: int | None) -> Sequence[int]:
        if most_tokens is not None:
            self._check_length(text, most_tokens)
        return self._ids(text, add_special_tokens)

    def _ids(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        # The fast variant skips the offsets of tokens, which are not needed.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _check_length(self, text: str, most_tokens: int) -> None:
        """Refuse a text that is far too long, without tokenising all of it."""
        if len(text) > max(most_tokens, 1) * self._longest:
            raise TooLong
        head = _HEAD * most_tokens
        while head < len(text) // 2:
            if len(self._ids(text[:head], False)) > _MARGIN * most_tokens + 64:
                raise TooLong
            head *= 4


def tokenize(tokenizer: ChatTokenizer, asked: Mapping[str, Any]) -> tuple[Sequence[int], int]:
    """Ids of a request's prompt, and how many of them only its leading system message decides.

    Args:
        asked: `shared.tokenizing.messages.request_fields`, and `most_tokens`: ids that there may be; None: any number.

    Raises:
        Refusal: the template refuses the messages, or the prompt has no tokens.
        TooLong: there are more.
    """
    messages, most_tokens = asked["messages"], asked.get("most_tokens")
    if messages is None:
        ids, shared = tokenizer.plain(asked["prompt"], most_tokens), 0
    else:
        messages = [_with_placeholders(message) for message in messages]
        ids = _chat(tokenizer, messages, most_tokens)
        shared = _shared(tokenizer, messages[:1], ids) if asked["share_system_prompt"] else 0
    if not ids:
        raise Refusal(JobFailure.TEMPLATE, "The prompt has no tokens.")
    if most_tokens is not None and len(ids) > most_tokens:
        raise TooLong(len(ids))
    return ids, shared


def _chat(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], most_tokens: int | None) -> Sequence[int]:
    if not tokenizer.has_template:
        raise Refusal(JobFailure.TEMPLATE, "This model has no chat template: send a prompt.")
    try:
        return tokenizer.chat(messages, add_generation_prompt=True, most_tokens=most_tokens)
    except TooLong:
        raise
    except chat_template.TooMuchText as error:
        raise Refusal(JobFailure.TEMPLATE, f"The model's chat template wrote {error}.") from error
    except MemoryError as error:
        raise Refusal(JobFailure.TEMPLATE, "The model's chat template took too much memory.") from error
    except Exception as error:
        # A template is a program and may raise anything. Only a message that it raises itself is passed on.
        said = f": {str(error)[:_MOST_SAID]}" if type(error) is TemplateError else "."
        raise Refusal(JobFailure.TEMPLATE, f"The model's chat template refused the messages{said}") from error


def _shared(tokenizer: ChatTokenizer, first: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> int:
    """The leading system message is rendered alone, so what follows it cannot be in it."""
    try:
        alone = tokenizer.chat(first, add_generation_prompt=False)
    except Exception:  # noqa: BLE001 - a template may want more than a system message
        return 0
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, ids, strict=False)))


def _with_placeholders(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Templates know images by the type of their part alone."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": [{"type": "image"} if part.get("type") == "image" else part for part in content]}


def _read(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_FILE + 1)
        if len(content) > MOST_FILE:
            raise Refusal(TokenizerFault.UNUSABLE, f"the tokenizer's file has more than {MOST_FILE} bytes")
        return content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise Refusal(TokenizerFault.CORRUPT, f"the tokenizer's file cannot be read: {error}") from error
