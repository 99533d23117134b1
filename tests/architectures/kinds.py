"""The kinds of architectures, by the caches of their layers."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from mlx_lm.models.cache import make_prompt_cache


class Kind(StrEnum):
    """What the layers of a model keep of the tokens before."""

    ATTENTION = "attention"
    WINDOW = "sliding windows"
    HYBRID = "attention and recurrent state"
    RECURRENT = "recurrent state"
    LISTS = "several caches per layer"
    OTHER = "caches of its own"

    @property
    def can_be_cut(self) -> bool:
        """Whether the caches can be shortened to any number of tokens."""
        return self not in (Kind.HYBRID, Kind.RECURRENT, Kind.OTHER)


def kind_of(model: Any) -> Kind:
    """Return the kind of a model."""
    layers = make_prompt_cache(model)
    caches = {type(part).__name__ for layer in layers for part in getattr(layer, "caches", [layer])}
    if caches == {"ArraysCache"}:
        return Kind.RECURRENT
    if "ArraysCache" in caches:
        return Kind.HYBRID
    if "RotatingKVCache" in caches:
        return Kind.WINDOW
    if caches != {"KVCache"}:
        return Kind.OTHER
    return Kind.LISTS if any(hasattr(layer, "caches") for layer in layers) else Kind.ATTENTION
