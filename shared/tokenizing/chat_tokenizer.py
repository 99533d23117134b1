"""Converts requests to token ids, inside a helper process."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer

from shared.errors import JobFailure
from shared.tokenizing import chat_template
from shared.tokenizing.conversation import Conversation, UnsupportedField, conversation_of
from shared.tokenizing.messages import TokenizerFault, TokenizerSource, digest
from shared.tokenizing.special_tokens import NotText, SpecialTokens

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
    """A request cannot be tokenised.

    Attributes:
        code: a `JobFailure` or a `TokenizerFault`.
        field: the request field at fault, if it is not the prompt.
    """

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class TooLong(Exception):
    """A prompt exceeds the limit. `tokens` is its length; None if it was not tokenised completely."""

    def __init__(self, tokens: int | None = None) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class ChatTokenizer(Protocol):
    """A model's tokenizer and chat template."""

    def plain(self, text: str) -> Sequence[int]:
        """Tokenise a text and add special tokens. The first one is not added to a text that begins with it."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Tokenise a text, for example the output of the template, and add no special tokens."""
        ...

    def encode_as_text(self, text: str) -> Sequence[int]:
        """Tokenise a text without recognising special or added tokens in it."""
        ...

    def check_length(self, text: str, max_tokens: int) -> None:
        """Raise `TooLong` for a text that is far too long, without tokenising all of it."""
        ...

    def render(self, conversation: Conversation) -> str:
        """Apply the chat template. Each image becomes one token of the text. May raise any exception."""
        ...

    def template(self, with_tools: bool) -> str | None:
        """Return the Jinja template for conversations with or without tools; None if there is none."""
        ...

    @property
    def reasons(self) -> bool:
        """Whether answers begin with reasoning by default."""
        ...

    @property
    def explains_tools(self) -> bool:
        """Whether the system message explains tools; see `shared.tokenizing.generic_tools`."""
        ...

    @property
    def special_tokens(self) -> SpecialTokens:
        """The tokens that messages must not contain."""
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
    def library(self) -> Tokenizer:
        """The object of the tokenizer library."""
        return self._tokenizer

    @property
    def has_template(self) -> bool:
        """See `ChatTokenizer`."""
        return self._source.chat_template is not None

    def template(self, with_tools: bool) -> str | None:
        """See `ChatTokenizer`."""
        source = self._source
        return source.tool_template if with_tools and source.tool_template is not None else source.chat_template

    @property
    def reasons(self) -> bool:
        """See `ChatTokenizer`."""
        return bool(self._source.variables.get("enable_thinking", self._source.variables.get("thinking")))

    @property
    def explains_tools(self) -> bool:
        """See `ChatTokenizer`."""
        return self._source.explain_tools

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """See `ChatTokenizer`."""
        templates = (self._source.chat_template, self._source.tool_template)
        return special_tokens_of(self._tokenizer.get_added_tokens_decoder().values(), templates)

    def text_of(self, token: int) -> str:
        """See `ChatTokenizer`."""
        return str(self._tokenizer.id_to_token(token))

    def plain(self, text: str) -> Sequence[int]:
        """See `ChatTokenizer`."""
        bos = self._source.bos_token
        return self._ids(text, bos is None or not text.startswith(bos))

    def encode(self, text: str) -> Sequence[int]:
        """See `ChatTokenizer`."""
        return self._ids(text, False)

    def encode_as_text(self, text: str) -> Sequence[int]:
        """See `ChatTokenizer`."""
        return encode_as_text(self._tokenizer, text)

    def render(self, conversation: Conversation) -> str:
        """See `ChatTokenizer`."""
        template = self.template(bool(conversation.tools))
        if template is None:
            raise ValueError("the tokenizer has no chat template")
        return chat_template.render(
            template,
            conversation.messages,
            {**self._source.variables, **conversation.variables},
            tools=conversation.tools,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final=conversation.continue_final,
        )

    def _ids(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        # This method does not compute the offsets of tokens.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def check_length(self, text: str, max_tokens: int) -> None:
        """See `ChatTokenizer`."""
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
    max_tokens = request.get("max_tokens")
    if request["messages"] is None and (request.get("raw", True) or not tokenizer.has_template):
        _check_no_tools(request)
        if max_tokens is not None:
            tokenizer.check_length(request["prompt"], max_tokens)
        ids, shared = tokenizer.plain(request["prompt"]), 0
    else:
        ids, shared = _chat(_Chat(tokenizer, bool(request.get("special_tokens"))), request, max_tokens)
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


def _check_no_tools(request: Mapping[str, Any]) -> None:
    """Refuse options of a chat template for a prompt that is continued without one."""
    for name, field in (("tools", "tools"), ("template_variables", "chat_template_kwargs")):
        if request.get(name):
            raise CannotTokenize(JobFailure.TEMPLATE, f"{field} needs a chat template.", field)


def _chat(chat: _Chat, request: Mapping[str, Any], max_tokens: int | None) -> tuple[Sequence[int], int]:
    """Tokenise a conversation; return the ids and the length of the prefix that depends only on the first message."""
    tokenizer = chat.tokenizer
    if not tokenizer.has_template:
        raise CannotTokenize(JobFailure.TEMPLATE, "This model has no chat template. Send a prompt instead of messages.")
    try:
        explain = tokenizer.explains_tools
        features = _features(tokenizer, bool(request.get("tools")) and not explain)
        conversation = conversation_of(request, features, reasons=tokenizer.reasons, explain_tools=explain)
        ids = chat.ids(conversation, max_tokens)
    except TooLong:
        raise
    except Exception as error:
        raise _refusal(error) from error
    return ids, _shared_length(chat, conversation, ids) if request["share_system_prompt"] else 0


def _features(tokenizer: ChatTokenizer, with_tools: bool) -> chat_template.Features | None:
    template = tokenizer.template(with_tools)
    return None if template is None else chat_template.features(template)


def _refusal(error: Exception) -> CannotTokenize:
    """Return the refusal of a conversation. A template may raise any exception."""
    field = None
    match error:
        case UnsupportedField():
            message, field = str(error), error.field
        case NotText():
            message = f"The model's tokenizer cannot represent {str(error)!r} as text. Remove it from the prompt."
        case chat_template.CannotContinue():
            message = "The model's chat template changes the last message, so that it cannot be continued."
            field = "continue_final_message"
        case chat_template.OutputTooLong():
            message = f"The model's chat template wrote {error}."
        case MemoryError():
            message = "The model's chat template needs too much memory."
        case _:  # only the message that the template raises itself is shown to the caller
            reason = f": {str(error)[:_MAX_MESSAGE]}" if type(error) is TemplateError else "."
            message = f"The model's chat template rejected the messages{reason}"
    return CannotTokenize(JobFailure.TEMPLATE, message, field)


class _Chat:
    """Tokenises conversations.

    Args:
        special_tokens: whether special tokens in messages are tokens, not text.
    """

    def __init__(self, tokenizer: ChatTokenizer, special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self._special_tokens = special_tokens

    def ids(self, conversation: Conversation, max_tokens: int | None = None) -> Sequence[int]:
        """Render a conversation and tokenise the text. May raise any exception."""
        broken = None if self._special_tokens else self.tokenizer.special_tokens.broken(conversation)
        text = self._render(broken.conversation if broken else conversation)
        if max_tokens is not None:
            self.tokenizer.check_length(text, max_tokens)
        if broken is None:
            return self.tokenizer.encode(text)
        return self.tokenizer.special_tokens.encode(text, broken.character, self.tokenizer)

    def _render(self, conversation: Conversation) -> str:
        """Apply the template. Templates differ in what they expect of tool calls; find the variant that they accept."""
        if not conversation.calls:
            return self.tokenizer.render(conversation)
        as_text = conversation.with_text_arguments()
        variants = (conversation, as_text, conversation.with_empty_contents(), as_text.with_empty_contents())
        failure: Exception | None = None
        for variant in variants:
            try:
                text = self.tokenizer.render(variant)
            except Exception as error:  # noqa: BLE001 - a template may raise any exception
                failure = failure or error
                continue
            return self.tokenizer.render(as_text) if _shows_python(text, variant) else text
        raise failure or ValueError("no variant")


def _shows_python(text: str, conversation: Conversation) -> bool:
    """Whether a template printed the arguments of a tool call in Python's notation instead of JSON."""
    arguments = [call["arguments"] for call in conversation.calls]
    return any(str(each) in text for each in arguments if isinstance(each, dict) and str(each) != json.dumps(each))


def _shared_length(chat: _Chat, conversation: Conversation, ids: Sequence[int]) -> int:
    """Return the length of the prefix of `ids` that depends only on the first message and the tools.

    The first message is also rendered alone; later messages cannot influence the tokens that both results begin with.
    """
    try:
        system = chat.ids(conversation.first_message())
    except Exception:  # noqa: BLE001 - a template may require further messages
        return 0
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(system, ids, strict=False)))


def special_tokens_of(added: Iterable[Any], templates: Iterable[str | None]) -> SpecialTokens:
    """Return the special tokens of a tokenizer, and of its other added tokens those that its templates use.

    Args:
        added: the added tokens, with `content` and `special`.
    """
    tokens = [*added]
    known = (chat_template.features(template) for template in templates if template is not None)
    literals = "\0".join(each.literals for each in known if each is not None)
    markers = (token.content for token in tokens if token.content in literals and not token.content.isspace())
    return SpecialTokens((token.content for token in tokens if token.special), markers)


def encode_as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a text with all steps of a tokenizer but the search for added tokens."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    words = [text]
    if tokenizer.pre_tokenizer is not None:
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in tokenizer.model.tokenize(word)]


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
