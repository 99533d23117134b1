"""Tokenise prompts at admission, so that a prompt that does not fit its model is refused instead of queued.

A helper process does the work (`shared.tokenizing`). If the API does not have a model's tokenizer, the worker tokenises
the prompt later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Final, TypeVar

from shared.errors import Invalid, JobFailure, PromptRefused, Unavailable
from shared.jobs.request import Request
from shared.models.image_tokens import image_tokens
from shared.models.registry import ModelCard
from shared.tokenizing.client import (
    TokenizerBroken,
    TokenizerBusy,
    TokenizerCorrupt,
    TokenizerError,
    Tokenizing,
)
from shared.tokenizing.files import TokenizerFiles
from shared.tokenizing.messages import Tokenized, TokenizerSource

T = TypeVar("T")

log = logging.getLogger(__name__)

_BROKEN_S: Final = 60.0
"""Seconds before a tokenizer that could not be loaded is tried again."""
_RETRY_AFTER_S: Final = 5.0


class PromptTokenizer:
    """Tokenises requests for models whose tokenizer is available.

    Args:
        files: the tokenizers that this host has or can fetch.
    """

    def __init__(self, tokenizing: Tokenizing, files: TokenizerFiles) -> None:
        self._tokenizing = tokenizing
        self._files = files
        self._broken_until: dict[str, float] = {}

    def tokenize(self, card: ModelCard, request: Request, field: str) -> Tokenized | None:
        """Return a request's token ids, or None if the worker has to tokenise the prompt.

        Args:
            field: name of the request field with the prompt, for error messages.

        Raises:
            Invalid: the prompt exceeds the context or has an unknown token, or the model's chat template refuses it.
            Unavailable: too many prompts are waiting to be tokenised.
            redis.RedisError: Redis is unavailable.
        """
        if request.image_parts:
            _check_images_fit(card, request, field)
        return self._guarded(card, request, field, card.context)

    def tokenize_inputs(self, card: ModelCard, request: Request, field: str) -> tuple[int, ...] | None:
        """Return the token ids of a request's inputs, packed; None if the worker has to tokenise them.

        Raises like `tokenize`.
        """
        return self._with_source(card, field, lambda source: self._tokenizing.tokenize_inputs(source, request, card))

    def load(self, cards: Iterable[ModelCard]) -> bool:
        """Load the tokenizers of models before their first prompts. Returns whether any of them was available.

        Raises:
            redis.RedisError: Redis is unavailable.
        """
        available = [self._load(card.tokenizer, card) for card in cards if card.tokenizer is not None]
        return any(available)

    def _load(self, digest: str, card: ModelCard) -> bool:
        try:
            path = self._files.path(digest)
            if path is None:
                return False
            self._tokenizing.load(TokenizerSource.of_card(str(path), digest, asdict(card)))
        except (TokenizerError, OSError) as error:  # the first prompt tries again
            log.warning("tokenizer_not_loaded", extra={"model": card.id, "reason": str(error)})
        return True

    def count(self, card: ModelCard, request: Request, field: str) -> int | None:
        """Return how many tokens the model would read, or None if the tokenizer is unavailable. Raises like `tokenize`.

        The count may exceed the model's context.
        """
        tokenized = self._guarded(card, request, field, context=None)
        return None if tokenized is None else len(tokenized.tokens) + image_token_count(card, request, field)

    def _guarded(self, card: ModelCard, request: Request, field: str, context: int | None) -> Tokenized | None:
        reserved = image_token_count(card, request, field)

        def tokenize(source: TokenizerSource) -> Tokenized:
            return self._tokenizing.tokenize(
                source, request, context=context, reserved=reserved, vocabulary=card.vocabulary
            )

        return self._with_source(card, field, tokenize)

    def _with_source(self, card: ModelCard, field: str, work: Callable[[TokenizerSource], T]) -> T | None:
        """Call `work` with the model's tokenizer; return None if it is not available."""
        if card.tokenizer is None or self._broken_until.get(card.tokenizer, 0.0) > time.monotonic():
            return None
        try:
            return self._with_file(card, card.tokenizer, work)
        except PromptRefused as refused:
            raise Invalid(str(refused), code=refused.code, field=refused.field or field) from refused
        except TokenizerBusy as busy:
            log.warning("tokenizer_busy", extra={"reason": str(busy)})
            detail = "Too many prompts are waiting to be tokenised. Try again shortly."
            raise Unavailable(detail, retry_after=_RETRY_AFTER_S) from busy
        except (TokenizerBroken, OSError) as error:
            log.warning("tokenizer_unusable", extra={"model": card.id, "reason": str(error)})
            self._broken_until[card.tokenizer] = time.monotonic() + _BROKEN_S
            return None

    def check_constraints(self, request: Request) -> None:
        """Check the constraints of a request's answer. If that is not possible now, the worker checks them.

        Raises:
            Invalid: one of them cannot be honoured.
        """
        try:
            self._tokenizing.check_constraints(request)
        except PromptRefused as refused:
            raise Invalid(str(refused), code=refused.code, field=refused.field) from refused
        except (TokenizerError, OSError) as error:
            log.warning("constraint_not_checked", extra={"reason": str(error)})

    def _with_file(self, card: ModelCard, digest: str, work: Callable[[TokenizerSource], T]) -> T | None:
        """Call `work` with the tokenizer's file; fetch the file again if it is corrupt."""
        for _ in range(2):
            path = self._files.path(digest)
            if path is None:
                return None
            try:
                return work(TokenizerSource.of_card(str(path), digest, asdict(card)))
            except TokenizerCorrupt as corrupt:
                log.warning("tokenizer_corrupt", extra={"model": card.id, "reason": str(corrupt)})
                self._files.discard(digest)
        raise TokenizerBroken("the tokenizer file was corrupt again after it was fetched again")


def image_token_count(card: ModelCard, request: Request, field: str) -> int:
    """Return how many tokens a request's images occupy in addition to one placeholder each; 0 if only the worker knows.

    Images without a size count as placeholders alone: a repeated request does not read its images again.

    Args:
        field: name of the request field with the prompt, for error messages.

    Raises:
        Invalid: the model does not support the shape of an image.
    """
    if (rule := card.token_rule) is None:
        return 0
    try:
        sizes = [(part["width"], part["height"]) for part in request.image_parts if part["width"]]
        return sum(image_tokens(rule, width, height) - 1 for width, height in sizes)
    except ValueError as error:
        raise Invalid(f"The model does not support the shape of an image: {error}.", field=field) from error


def _check_images_fit(card: ModelCard, request: Request, field: str) -> None:
    """Refuse images that exceed the context without any text, even if the API does not have the tokenizer.

    Raises:
        Invalid: the images exceed the context, or the model does not support the shape of one.
    """
    tokens = image_token_count(card, request, field) + len(request.image_parts)
    if tokens >= card.context:
        detail = (
            f"The images of the prompt take {tokens} tokens, and the model's context is {card.context} tokens. "
            "Send fewer or smaller images."
        )
        raise Invalid(detail, code=JobFailure.CONTEXT_LENGTH, field=field)
