"""How often the guesses of one row come true, told by how much of the text before them was the same.

It is learned from every token for which there was a guess, whether the guess was used or not: so nothing has to be
tried to know it.
"""

from __future__ import annotations

from typing import Final

LONGEST = 16
"""More tokens in common make a guess no surer."""

_REMEMBERED = 24
"""Of guesses of a kind: then what came before counts half. Texts change as they go on."""

_KINDS: Final = (0, 0, 0, 1, *(2,) * 4, *(3,) * 8, 4)
"""Of guess by tokens in common: 2, 3, 4 to 7, 8 to 15, more."""

_AT_FIRST: Final = (0.25, 0.4, 0.6, 0.85, 0.95)
"""Of each kind, what is thought before anything is known; it counts as two guesses."""


class Odds:
    """The part of its guesses that came true of late, by kind."""

    def __init__(self) -> None:
        self._hits = [2 * part for part in _AT_FIRST]
        self._tries = [2.0] * len(_AT_FIRST)

    def learn(self, length: int, hit: bool) -> None:
        """A guess with so many tokens in common came true, or did not."""
        kind = _KINDS[length]
        self._hits[kind] += hit
        self._tries[kind] += 1
        if self._tries[kind] > _REMEMBERED:
            self._hits[kind] /= 2
            self._tries[kind] /= 2

    def of(self, length: int) -> float:
        """That the next token is the one guessed."""
        kind = _KINDS[length]
        return self._hits[kind] / self._tries[kind]

    def expected(self, length: int, most: int) -> list[float]:
        """How many of the next tokens will be those guessed when one, two, …, so many are."""
        total, all_so_far, sums = 0.0, 1.0, []
        for i in range(most):
            all_so_far *= self.of(min(length + i, LONGEST))
            total += all_so_far
            sums.append(total)
        return sums
