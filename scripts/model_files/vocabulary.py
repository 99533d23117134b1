"""Extends a tokenizer to the size of a model's vocabulary: every token that the model may generate needs a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.models.folder import ModelError


def add_special_tokens(tokenizer: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return tokenizer.json with special tokens appended."""
    added = tokenizer.get("added_tokens", [])
    first = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in added)) + 1 if names else 0
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = [{"id": first + number, "content": name, **flags} for number, name in enumerate(names)]
    return tokenizer | {"added_tokens": [*added, *new]} if new else tokenizer


def pad_vocabulary(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """Return tokenizer.json filled up to `size` tokens with words that no text encodes to.

    Raises:
        ModelError: it has more than `size` tokens, or its kind cannot be extended.
    """
    vocabulary = tokenizer["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise ModelError("the tokenizer's vocabulary is not a table of words; use a tokenizer of another kind")
    used = {*vocabulary.values(), *(token["id"] for token in tokenizer.get("added_tokens", []))}
    if max(used) >= size:
        raise ModelError(f"the tokenizer has {max(used) + 1:,} tokens, the model only {size:,}")
    fillers = {f"Ġ~{number}": number for number in range(size) if number not in used}
    return tokenizer | {"model": tokenizer["model"] | {"vocab": vocabulary | fillers}}
