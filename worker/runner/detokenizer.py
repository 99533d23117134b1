"""Detokenization of one sequence, token by token. The texts add up to the decoded text of all tokens.

mlx-lm's own streaming detokenizers trim the first space, so that ` Paris.` becomes `Paris.`, and guess how a tokenizer
marks spaces from its files. The tokenizers library decodes with the tokenizer itself, at a fifth of the cost (1.9
instead of 11 µs per token of SmolLM2).
"""

from __future__ import annotations

from typing import Any, Final

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from worker.runner.base import Detokenizer

_MAX_HELD: Final = 16
"""Maximum tokens without complete text. A character has at most four bytes, so more tokens are not valid UTF-8."""
_CONTEXT: Final = 8
"""Tokens before a new stream that it decodes with: a tokenizer may treat the start of a text in a special way."""


def make_detokenizer(tokenizer: Any) -> Detokenizer:
    """Return a detokenizer for one sequence.

    Args:
        tokenizer: mlx-lm's or mlx-vlm's.
    """
    backend = backend_tokenizer(tokenizer)
    return LibraryDetokenizer(tokenizer.detokenizer) if backend is None else StreamDetokenizer(backend)


def backend_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Return the tokenizer of the tokenizers library inside mlx-lm's or mlx-vlm's; None for one written in Python."""
    inner = getattr(tokenizer, "_tokenizer", None)
    for each in (tokenizer, inner):
        backend = getattr(each, "backend_tokenizer", None)
        if isinstance(backend, Tokenizer):
            return backend
    return None


class StreamDetokenizer:
    """See `Detokenizer`. For tokenizers of the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream()
        self._held: list[int] = []  # tokens without text so far
        self._context: list[int] = []  # tokens before them

    def add(self, token: int) -> str:
        """See `Detokenizer.add`."""
        self._held.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # noqa: BLE001 - of invalid UTF-8, whose decoded text changes with the next byte
            return self.finish()
        if text is not None:
            self._release()
            return str(text)
        return self.finish() if len(self._held) > _MAX_HELD else ""

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        if not self._held:
            return ""
        before, after = (self._decoded(tokens) for tokens in (self._context, [*self._context, *self._held]))
        self._release()
        self._stream = DecodeStream(ids=list(self._context))
        return after[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _release(self) -> None:
        self._context = [*self._context, *self._held][-_CONTEXT:]
        self._held = []


class LibraryDetokenizer:
    """See `Detokenizer`. mlx-lm's detokenizer, for tokenizers that are written in Python.

    Args:
        inner: a new detokenizer of mlx-lm.
    """

    def __init__(self, inner: Any) -> None:
        if hasattr(inner, "_maybe_trim_space"):
            inner._maybe_trim_space = str  # noqa: SLF001 - no public option
        self._inner = inner

    def add(self, token: int) -> str:
        """See `Detokenizer.add`."""
        self._inner.add_token(token)
        return str(self._inner.last_segment)

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        self._inner.finalize()
        return str(self._inner.last_segment)
