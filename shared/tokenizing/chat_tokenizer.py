"""Converts requests to token ids, inside a helper process."""

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

_MAX_FILE_BYTES: Final = 256 * 2**20
"""Maximum size of a `tokenizer.json`; the largest known ones have 35 MB."""
_MAX_MESSAGE: Final = 1000
"""Maximum characters of a template's error message."""
_HEAD: Final = 6
"""Characters per allowed token in the part of a long text that is tokenised first. Most tokens have fewer characters,
so a text that is far too long is rejected after this part. Each MB of text takes 0.7 s and 170 MB of memory."""
_MARGIN: Final = 1.05
"""A part of a text may have slightly more tokens alone than within the whole text."""


class CannotTokenize(Exception):
    """A request cannot be tokenised. `code` is a `JobFailure` or a `TokenizerFault`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TooLong(Exception):
    """A prompt exceeds the limit. `tokens` is its length; None if it was not tokenised completely."""

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class ChatTokenizer(Protocol):
    """A model's tokenizer and chat template.

    Both methods may raise `TooLong` early if a text certainly has more than `max_tokens` tokens.
    """

    def plain(self, text: str, max_tokens: int | None) -> Sequence[int]:
        """Tokenise a text and add special tokens. The first one is not added to a text that begins with it."""
        ...

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, max_tokens: int | None = None
    ) -> Sequence[int]:
        """Render messages and tokenise the text, with one token per image. May raise any exception."""
        ...

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template. A set of named templates counts if one is the default."""
        ...

    def text_of(self, token: int) -> str:
        """Return how the tokenizer writes a token, for error messages."""
        ...


class FileTokenizer:
    """A tokenizer from a `tokenizer.json` and a template, which needs no model library."""

    def __init__(self, source: TokenizerSource, tokenizer: Tokenizer) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, source: TokenizerSource) -> FileTokenizer:
        """Load the source's file.

        Raises:
            CannotTokenize: the file is missing, has the wrong digest, or is not a valid tokenizer.
        """
        text = _read(Path(source.path))
        if source.digest and digest(text) != source.digest:
            raise CannotTokenize(TokenizerFault.CORRUPT, "the tokenizer's file does not match its digest")
        try:
            return cls(source, Tokenizer.from_str(text))
        except BaseException as error:  # the library raises plain exceptions and panics
            raise CannotTokenize(TokenizerFault.UNUSABLE, f"the tokenizer cannot be loaded: {error}") from error

    @property
    def has_template(self) -> bool:
        """See `ChatTokenizer`."""
        return self._source.chat_template is not None

    def text_of(self, token: int) -> str:
        """See `ChatTokenizer`."""
        return str(self._tokenizer.id_to_token(token))

    def plain(self, text: str, max_tokens: int | None) -> Sequence[int]:
        """See `ChatTokenizer`."""
        bos = self._source.bos_token
        return self._tokenize(text, bos is None or not text.startswith(bos), max_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, max_tokens: int | None = None
    ) -> Sequence[int]:
        """See `ChatTokenizer`."""
        source = self._source
        if source.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        text = chat_template.render(
            source.chat_template, messages, source.variables, add_generation_prompt=add_generation_prompt
        )
        return self._tokenize(text, False, max_tokens)

    def _tokenize(self, text: str, add_special_tokens: bool, max_tokens: int | None) -> Sequence[int]:
        if max_tokens is not None:
            self._check_length(text, max_tokens)
        return self._ids(text, add_special_tokens)

    def _ids(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        # This method does not compute the offsets of tokens.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Raise `TooLong` for a text that is far too long, without tokenising all of it."""
        if len(text) > max(max_tokens, 1) * self._longest:
            raise TooLong
        head = _HEAD * max_tokens
        while head < len(text) // 2:
            if len(self._ids(text[:head], False)) > _MARGIN * max_tokens + 64:
                raise TooLong
            head *= 4


def tokenize(tokenizer: ChatTokenizer, request: Mapping[str, Any]) -> tuple[Sequence[int], int]:
    """Tokenise the prompt of a request.

    Args:
        request: `shared.tokenizing.messages.request_fields`; `max_tokens` and `vocabulary` if there are such limits.

    Returns:
        The token ids, and the length of the prefix that depends only on the leading system message.

    Raises:
        CannotTokenize: the template rejected the messages, or the prompt has no tokens, or one that the model's
            embedding does not have.
        TooLong: the prompt has more than `max_tokens` tokens.
    """
    messages, max_tokens = request["messages"], request.get("max_tokens")
    if messages is None and not request.get("raw", True) and tokenizer.has_template:
        messages = [{"role": "user", "content": request["prompt"]}]
    if messages is None:
        ids, shared = tokenizer.plain(request["prompt"], max_tokens), 0
    else:
        messages = [_with_placeholders(message) for message in messages]
        ids = _chat(tokenizer, messages, max_tokens)
        shared = _shared_length(tokenizer, messages[:1], ids) if request["share_system_prompt"] else 0
    if not ids:
        raise CannotTokenize(JobFailure.TEMPLATE, "The prompt is empty: it has no tokens.")
    if max_tokens is not None and len(ids) > max_tokens:
        raise TooLong(len(ids))
    _check_embedded(tokenizer, ids, request.get("vocabulary"))
    return ids, shared


def _check_embedded(tokenizer: ChatTokenizer, ids: Sequence[int], vocabulary: int | None) -> None:
    """Refuse tokens beyond the embedding. A tokenizer may have more tokens than the model was given weights for."""
    if vocabulary is None or max(ids) < vocabulary:
        return
    token = next(each for each in ids if each >= vocabulary)
    message = (
        f"The prompt contains the token {tokenizer.text_of(token)!r} (id {token}), which the model does not know: it "
        f"has {vocabulary} tokens. Remove the token from the prompt."
    )
    raise CannotTokenize(JobFailure.TEMPLATE, message)


def _chat(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], max_tokens: int | None) -> Sequence[int]:
    if not tokenizer.has_template:
        raise CannotTokenize(JobFailure.TEMPLATE, "This model has no chat template. Send a prompt instead of messages.")
    try:
        return tokenizer.chat(messages, add_generation_prompt=True, max_tokens=max_tokens)
    except TooLong:
        raise
    except chat_template.OutputTooLong as error:
        raise CannotTokenize(JobFailure.TEMPLATE, f"The model's chat template wrote {error}.") from error
    except MemoryError as error:
        raise CannotTokenize(JobFailure.TEMPLATE, "The model's chat template needs too much memory.") from error
    except Exception as error:
        # A template may raise any exception. Only the message that it raises itself is shown to the caller.
        reason = f": {str(error)[:_MAX_MESSAGE]}" if type(error) is TemplateError else "."
        raise CannotTokenize(JobFailure.TEMPLATE, f"The model's chat template rejected the messages{reason}") from error


def _shared_length(tokenizer: ChatTokenizer, first: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> int:
    """Return the length of the prefix of `ids` that depends only on the first message.

    The first message is also rendered alone; later messages cannot influence the tokens that both results begin with.
    """
    try:
        system = tokenizer.chat(first, add_generation_prompt=False)
    except Exception:  # noqa: BLE001 - a template may require further messages
        return 0
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(system, ids, strict=False)))


def _with_placeholders(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reduce image parts to their type, which is all that templates use."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": [{"type": "image"} if part.get("type") == "image" else part for part in content]}


def _read(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise CannotTokenize(
                TokenizerFault.UNUSABLE, f"the tokenizer's file has more than {_MAX_FILE_BYTES:,} bytes"
            )
        return content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CannotTokenize(TokenizerFault.CORRUPT, f"the tokenizer's file cannot be read: {error}") from error
