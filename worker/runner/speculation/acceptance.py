"""How often the drafts of one row are accepted, by how many tokens before them matched.

It is learned from every token for which there was a draft, also an unverified one. So no pass is spent on learning it,
and drafts that are wrong cost only lookups.
"""

from __future__ import annotations

from typing import Final

LONGEST = 16
"""Longer matches do not make a draft more reliable."""

_REMEMBERED = 24
"""Drafts of a kind after which earlier ones are halved: the character of a text changes."""

_KINDS: Final = (0, 0, 0, 1, *(2,) * 4, *(3,) * 8, 4)
"""Kind of a draft, by its matching tokens: up to 2, 3, 4 to 7, 8 to 15, 16."""

_PRIOR: Final = (0.25, 0.4, 0.6, 0.85, 0.95)
"""Of each kind, the rate before anything is known; it counts as two drafts."""


class Acceptance:
    """The recent acceptance rate of one row's drafts, by kind."""

    def __init__(self) -> None:
        self._hits = [2 * rate for rate in _PRIOR]
        self._tries = [2.0] * len(_PRIOR)

    def learn(self, match: int, hit: bool) -> None:
        """Note whether a draft token after `match` matching tokens was right."""
        kind = _KINDS[match]
        self._hits[kind] += hit
        self._tries[kind] += 1
        if self._tries[kind] > _REMEMBERED:
            self._hits[kind] /= 2
            self._tries[kind] /= 2

    def rate(self, match: int) -> float:
        """Probability that the next token is the draft's."""
        kind = _KINDS[match]
        return self._hits[kind] / self._tries[kind]

    def expected(self, match: int, most: int) -> list[float]:
        """How many of the next tokens will be accepted when 1, 2, …, `most` are drafted."""
        total, all_so_far, sums = 0.0, 1.0, []
        for i in range(most):
            all_so_far *= self.rate(min(match + i, LONGEST))
            total += all_so_far
            sums.append(total)
        return sums
