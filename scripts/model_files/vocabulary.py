"""A tokenizer for a model whose vocabulary is larger: every token that the model may choose needs a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.models.folder import ModelError


def with_special(tokenizer: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json with special tokens of these names behind all that it has."""
    added = tokenizer.get("added_tokens", [])
    first = max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in added)) + 1 if names else 0
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [{"id": first + number, "content": name, **flags} for number, name in enumerate(names)]
    return tokenizer | {"added_tokens": [*added, *more]} if more else tokenizer


def padded(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """tokenizer.json with fillers, words that no text leads to, up to `size` tokens.

    Raises:
        ModelError: it has more tokens than that, or is of a kind that cannot be filled up.
    """
    vocabulary = tokenizer["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise ModelError("the tokenizer's vocabulary is not a table of words; take one of another kind")
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer.get("added_tokens", []))}
    if max(taken) >= size:
        raise ModelError(f"the tokenizer has {max(taken) + 1:,} tokens, the model only {size:,}")
    fillers = {f"Ġ~{number}": number for number in range(size) if number not in taken}
    return tokenizer | {"model": tokenizer["model"] | {"vocab": vocabulary | fillers}}
