"""What a row may say next, guessed from what it has said or been told: text often repeats its prompt, or itself.

The last tokens are looked up in prompt and answer, and what followed them there is the guess. While it comes true it
goes on where it is; otherwise the last three tokens are looked up, then the last two, and the newest place counts. A
token costs a few lookups in a table, however long the row is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, takewhile

from worker.runner.base import IMAGE_TOKENS
from worker.runner.speculation.acceptance import LONGEST, Odds

_SIZES = (3, 2)
"""Tokens that are looked up together, in this order."""


class Lookup:
    """The tokens of one row, and what they make one guess.

    Attributes:
        odds: how often guesses came true here.
        length: how many of the last tokens were the same in the place that the guess is from; 0: there is no guess.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.odds = Odds()
        self.length = 0
        self._tokens: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in _SIZES}
        self._indexed = 0
        self._place = 0
        self.take(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def take(self, tokens: Sequence[int]) -> None:
        """Take in tokens that nobody guessed."""
        self._tokens += tokens
        self._index()
        self._look_up()

    def add(self, token: int) -> bool:
        """Take in the next token, and learn whether it was the one guessed."""
        hit = self.length > 0 and self._tokens[self._place] == token
        if self.length:
            self.odds.learn(self.length, hit)
        self._tokens.append(token)
        self._index()
        if hit:
            self._place += 1
            self.length = min(self.length + 1, LONGEST)
        else:
            self._look_up()
        return hit

    def guess(self, most: int) -> list[int]:
        """So many tokens that may come next; none without a guess. Where the row ends it goes round in its period."""
        if not self.length:
            return []
        there = [*takewhile(lambda token: token < IMAGE_TOKENS, self._tokens[self._place : self._place + most])]
        return [there[i % len(there)] for i in range(most)] if there else []

    def _index(self) -> None:
        """Remember where the runs end that have a token behind them by now."""
        for size, after in self._after.items():
            start = max(0, self._indexed - size)
            runs: Iterator[tuple[int, ...]] = zip(*(self._tokens[start + i : -1] for i in range(size)), strict=False)
            after.update(zip(runs, count(start + size)))
        self._indexed = len(self._tokens)

    def _look_up(self) -> None:
        self.length = 0
        for size, after in self._after.items():
            if place := after.get(tuple(self._tokens[-size:])):
                self._place, self.length = place, self._common(place)
                return

    def _common(self, place: int) -> int:
        """How many tokens before this place are the last ones of the row."""
        tokens, end = self._tokens, len(self._tokens)
        length = 0
        while length < min(LONGEST, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length
