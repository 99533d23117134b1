"""Draft tokens from the row's own text: text often repeats its prompt, or itself.

The last tokens are looked up in prompt and answer; the draft is what followed them there. As long as the draft is
right, it continues from the same place. Otherwise the last three tokens are looked up, then the last two; the newest
match counts. A token costs a few dictionary lookups, however long the row is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import count, takewhile

from worker.runner.base import IMAGE_TOKENS
from worker.runner.decode_row import DecodeRow
from worker.runner.speculation.acceptance import LONGEST, Acceptance
from worker.runner.speculation.proposer import Proposer

INDEXED_TOKENS = 512
"""Maximum tokens indexed per row and call: a 100,000-token prompt at once delayed a step by 65 ms."""

_SIZES = (3, 2)
"""Tokens that are looked up together, in this order."""


class NgramIndex:
    """The tokens of one row, and the draft that they suggest.

    Attributes:
        acceptance: how often drafts came true here.
        match: how many of the last tokens equal those before the place that the draft is from; 0: there is no draft.
    """

    def __init__(self, prompt: int = 0) -> None:
        self.acceptance = Acceptance()
        self.match = 0
        self._prompt = prompt
        self._tokens: list[int] = []
        self._after: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in _SIZES}
        self._indexed = 0
        self._place = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def catch_up(self, row: DecodeRow, most: int = INDEXED_TOKENS) -> bool:
        """Index at most `most` of the row's new tokens; whether that is all of them."""
        known, length = len(self), row.length
        self.take(row.cached[known : min(known + most, max(self._prompt, known))])
        for token in row.cached[len(self) : known + most]:
            self.add(token)
        if row.newest is not None and len(self) == length:
            self.add(row.newest)
        return len(self) >= length

    def take(self, tokens: Sequence[int]) -> None:
        """Index tokens for which there was no draft."""
        if tokens:
            self._tokens += tokens
            self._index()
            self._look_up()

    def add(self, token: int) -> bool:
        """Index the next token; whether the draft predicted it."""
        hit = self.match > 0 and self._tokens[self._place] == token
        if self.match:
            self.acceptance.learn(self.match, hit)
        self._tokens.append(token)
        self._index()
        if hit:
            self._place += 1
            self.match = min(self.match + 1, LONGEST)
        else:
            self._look_up()
        return hit

    def draft(self, length: int) -> list[int]:
        """`length` tokens that may come next; none without a draft. A draft that reaches the row's end is repeated."""
        if not self.match:
            return []
        there = [*takewhile(lambda token: token < IMAGE_TOKENS, self._tokens[self._place : self._place + length])]
        return [there[i % len(there)] for i in range(length)] if there else []

    def _index(self) -> None:
        """Index the end of each n-gram that is now followed by a token."""
        for size, after in self._after.items():
            start = max(0, self._indexed - size)
            grams: Iterator[tuple[int, ...]] = zip(*(self._tokens[start + i : -1] for i in range(size)), strict=False)
            after.update(zip(grams, count(start + size)))
        self._indexed = len(self._tokens)

    def _look_up(self) -> None:
        self.match = 0
        for size, after in self._after.items():
            if place := after.get(tuple(self._tokens[-size:])):
                self._place, self.match = place, self._common(place)
                return

    def _common(self, place: int) -> int:
        """How many tokens before this place equal the last ones of the row."""
        tokens, end = self._tokens, len(self._tokens)
        length = 0
        while length < min(LONGEST, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length


class NgramProposer(Proposer):
    """See `worker.runner.speculation.proposer.Proposer`."""

    def __init__(self) -> None:
        self._rows: dict[int, NgramIndex] = {}

    def expected(self, rows: Sequence[DecodeRow], most: int) -> list[list[float]]:
        """By how drafts with as long a match did in the same rows."""
        found = []
        for row in rows:
            index = self._rows.setdefault(row.row.uid, NgramIndex(len(row.row.prompt)))
            ready = index.catch_up(row) and index.match
            found.append(index.acceptance.expected(index.match, most) if ready else [])
        return found

    def propose(self, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """What followed the last tokens where they came before."""
        return [self._draft(row, length) for row in rows]

    def drop(self, uids: Collection[int]) -> None:
        """Drop the index of rows."""
        for uid in uids:
            self._rows.pop(uid, None)

    def _draft(self, row: DecodeRow, length: int) -> list[int]:
        index = self._rows.get(row.row.uid)
        return index.draft(length) if index is not None and len(index) >= row.length else []
