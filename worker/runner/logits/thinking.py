"""The tokens with which a model begins and ends its reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """Token sequences around a model's reasoning; none of them is empty."""

    start: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """Return the markers that mlx-lm's tokenizer declares; None if the model does not reason.

        Args:
            tokenizer: mlx-lm's wrapper.
        """
        start, end = (getattr(tokenizer, name, None) for name in ("think_start_tokens", "think_end_tokens"))
        return cls(tuple(start), tuple(end)) if start and end else None

    def open_in(self, prompt: Sequence[int], turn_ends: frozenset[int]) -> bool:
        """Return whether a prompt's last turn has begun a reasoning that it does not end.

        Args:
            turn_ends: tokens that end a turn. Markers before them belong to earlier turns.
        """
        for index in range(len(prompt) - 1, -1, -1):
            if prompt[index] in turn_ends:
                return False
            for marker, is_open in ((self.start, True), (self.end, False)):
                if prompt[index] == marker[0] and tuple(prompt[index : index + len(marker)]) == marker:
                    return is_open
        return False


def overlap(tokens: Sequence[int], marker: Sequence[int]) -> int:
    """Return how many of a marker's first tokens are the last of `tokens`."""
    for length in range(min(len(marker), len(tokens)), 0, -1):
        if tuple(tokens[len(tokens) - length :]) == tuple(marker[:length]):
            return length
    return 0
