"""Token ids of a request before it is accepted: a prompt that is too long, or that the template refuses, never waits.

The work is done in a helper process (`shared.tokenizing`). Where the API does not have the model's tokenizer, the
worker tokenises the prompt.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Final

from shared.errors import Invalid, PromptRefused, Unavailable
from shared.jobs.request import Request
from shared.models.registry import ModelCard
from shared.tokenizing.client import (
    TokenizerBroken,
    TokenizerBusy,
    TokenizerCorrupt,
    Tokenizing,
)
from shared.tokenizing.files import TokenizerFiles
from shared.tokenizing.messages import Tokenized, TokenizerSource

log = logging.getLogger(__name__)

_BROKEN_S: Final = 60.0
"""Time after which a tokenizer that could not be loaded is tried again."""
_RETRY_AFTER_S: Final = 5.0


class PromptTokenizer:
    """Tokenises requests for models whose tokenizer is known.

    Args:
        files: the tokenizers that this host has or can fetch.
    """

    def __init__(self, tokenizing: Tokenizing, files: TokenizerFiles) -> None:
        self._tokenizing = tokenizing
        self._files = files
        self._broken: dict[str, float] = {}

    def tokenize(self, card: ModelCard, request: Request, field: str) -> Tokenized | None:
        """A request's token ids; None when the worker has to find them.

        Args:
            field: where the prompt came in.

        Raises:
            Invalid: it leaves no room for an answer, or the model's template refuses it.
            Unavailable: too many prompts wait to be tokenised.
            redis.RedisError: Redis is away.
        """
        if card.tokenizer is None or self._broken.get(card.tokenizer, 0.0) > time.monotonic():
            return None
        try:
            return self._tokenized(card, card.tokenizer, request, field)
        except PromptRefused as refused:
            raise Invalid(str(refused), code=refused.code, field=field) from refused
        except TokenizerBusy as busy:
            log.warning("tokenizer_busy", extra={"reason": str(busy)})
            raise Unavailable("Too many prompts wait to be tokenised.", retry_after=_RETRY_AFTER_S) from busy
        except (TokenizerBroken, OSError) as error:
            log.warning("tokenizer_unusable", extra={"model": card.id, "reason": str(error)})
            self._broken[card.tokenizer] = time.monotonic() + _BROKEN_S
            return None

    def _tokenized(self, card: ModelCard, digest: str, request: Request, field: str) -> Tokenized | None:
        reserved = _image_tokens(card, request, field)
        for _ in range(2):
            path = self._files.path(digest)
            if path is None:
                return None
            source = TokenizerSource.of_card(str(path), digest, asdict(card))
            try:
                return self._tokenizing.tokenize(source, request, context=card.context, reserved=reserved)
            except TokenizerCorrupt as corrupt:
                log.warning("tokenizer_corrupt", extra={"model": card.id, "reason": str(corrupt)})
                self._files.discard(digest)
        raise TokenizerBroken("what was fetched is not what it should be, either")


def _image_tokens(card: ModelCard, request: Request, field: str) -> int:
    """Tokens that the images of a request take beyond the one that stands for each in the template.

    Raises:
        Invalid: the model takes no image of such a shape.
    """
    geometry = card.geometry
    if geometry is None:
        return 0
    try:
        sizes = [geometry.resized(part["width"], part["height"]) for part in request.image_parts]
    except ValueError as error:
        raise Invalid(f"The model takes no image of such a shape: {error}", field=field) from error
    return sum(width * height // geometry.factor**2 - 1 for width, height in sizes)
