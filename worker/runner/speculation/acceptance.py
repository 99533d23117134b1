"""The acceptance rate of a row's draft tokens, by the length of the match that produced the draft.

It is learned from every token for which there was a draft, verified or not. So learning costs no extra pass, and wrong
drafts cost only lookups.
"""

from __future__ import annotations

from typing import Final

MAX_MATCH = 16
"""Maximum match length in tokens. Longer matches do not make a draft more reliable."""

_HALF_LIFE = 24
"""Drafts per class after which the counts are halved, because the style of a text changes."""

_CLASSES: Final = (0, 0, 0, 1, *(2,) * 4, *(3,) * 8, 4)
"""The class of a draft, by its match length: up to 2, 3, 4 to 7, 8 to 15, 16."""

_PRIOR: Final = (0.25, 0.4, 0.6, 0.85, 0.95)
"""The initial rate by class; it counts as two drafts."""


class Acceptance:
    """The recent acceptance rate of one row's drafts, by class."""

    def __init__(self) -> None:
        self._accepted = [2 * rate for rate in _PRIOR]
        self._drafted = [2.0] * len(_PRIOR)

    def record(self, match: int, accepted: bool) -> None:
        """Record whether a draft token after `match` matching tokens was right."""
        index = _CLASSES[match]
        self._accepted[index] += accepted
        self._drafted[index] += 1
        if self._drafted[index] > _HALF_LIFE:
            self._accepted[index] /= 2
            self._drafted[index] /= 2

    def rate(self, match: int) -> float:
        """Return the probability that a draft token after `match` matching tokens is right."""
        index = _CLASSES[match]
        return self._accepted[index] / self._drafted[index]

    def expected(self, match: int, max_length: int) -> list[float]:
        """Return the expected number of accepted tokens for drafts of 1, 2, …, `max_length` tokens."""
        total, all_accepted, totals = 0.0, 1.0, []
        for i in range(max_length):
            all_accepted *= self.rate(min(match + i, MAX_MATCH))
            total += all_accepted
            totals.append(total)
        return totals
