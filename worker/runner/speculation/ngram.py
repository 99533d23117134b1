"""A proposer of draft tokens from the row's own text, because text often repeats its prompt or itself.

It looks up the last tokens of a row in the prompt and the answer; the draft is what followed them there. As long as the
draft is right, the next draft continues from the same occurrence. Otherwise it looks up the last three tokens, then the
last two, and uses the newest occurrence. Each token costs a few dictionary lookups, regardless of the row's length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import count, takewhile

from worker.runner.base import IMAGE_TOKENS
from worker.runner.decode_row import DecodeRow
from worker.runner.speculation.acceptance import MAX_MATCH, Acceptance
from worker.runner.speculation.proposer import Proposer

INDEXED_TOKENS = 512
"""Maximum tokens indexed per row and call. Indexing 100,000 prompt tokens at once delayed a step by 65 ms."""

_SIZES = (3, 2)
"""Sizes of the n-grams, in the order in which they are looked up."""


class NgramIndex:
    """The tokens of one row, indexed by n-grams, and the draft that they suggest.

    Args:
        prompt: number of prompt tokens.

    Attributes:
        acceptance: acceptance rate of this row's drafts.
        match: number of last tokens that equal those before the occurrence used for the draft; 0 if there is no draft.
    """

    def __init__(self, prompt: int = 0) -> None:
        self.acceptance = Acceptance()
        self.match = 0
        self._prompt = prompt
        self._tokens: list[int] = []
        self._next_index: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in _SIZES}
        self._indexed = 0
        self._draft_index = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def catch_up(self, row: DecodeRow, max_tokens: int = INDEXED_TOKENS) -> bool:
        """Index at most `max_tokens` of the row's new tokens. Returns whether all tokens are indexed."""
        known, length = len(self), row.length
        self.extend(row.cached_ids[known : min(known + max_tokens, max(self._prompt, known))])
        for token in row.cached_ids[len(self) : known + max_tokens]:
            self.add(token)
        if row.next_input is not None and len(self) == length:
            self.add(row.next_input)
        return len(self) >= length

    def extend(self, tokens: Sequence[int]) -> None:
        """Index tokens for which there was no draft."""
        if tokens:
            self._tokens += tokens
            self._index()
            self._look_up()

    def add(self, token: int) -> bool:
        """Index the next token. Returns whether the draft predicted it."""
        accepted = self.match > 0 and self._tokens[self._draft_index] == token
        if self.match:
            self.acceptance.record(self.match, accepted)
        self._tokens.append(token)
        self._index()
        if accepted:
            self._draft_index += 1
            self.match = min(self.match + 1, MAX_MATCH)
        else:
            self._look_up()
        return accepted

    def draft(self, length: int) -> list[int]:
        """Return a draft of `length` tokens; empty if there is none. Repeats a draft that reaches the row's end."""
        if not self.match:
            return []
        following = self._tokens[self._draft_index : self._draft_index + length]
        text = [*takewhile(lambda token: token < IMAGE_TOKENS, following)]
        return [text[i % len(text)] for i in range(length)] if text else []

    def _index(self) -> None:
        """Index the n-grams that a token follows now."""
        for size, next_index in self._next_index.items():
            start = max(0, self._indexed - size)
            grams: Iterator[tuple[int, ...]] = zip(*(self._tokens[start + i : -1] for i in range(size)), strict=False)
            next_index.update(zip(grams, count(start + size)))
        self._indexed = len(self._tokens)

    def _look_up(self) -> None:
        self.match = 0
        for size, next_index in self._next_index.items():
            if index := next_index.get(tuple(self._tokens[-size:])):
                self._draft_index, self.match = index, self._match_length(index)
                return

    def _match_length(self, index: int) -> int:
        """Return how many tokens before this index equal the last ones of the row."""
        tokens, end = self._tokens, len(self._tokens)
        length = 0
        while length < min(MAX_MATCH, index) and tokens[index - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length


class NgramProposer(Proposer):
    """See `worker.runner.speculation.proposer.Proposer`."""

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def expected(self, rows: Sequence[DecodeRow], max_length: int) -> list[list[float]]:
        """Estimate acceptance by earlier drafts of the same row with as long a match."""
        return [self._expected(row, max_length) for row in rows]

    def propose(self, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """Return the tokens that followed an earlier occurrence of the last tokens."""
        return [self._draft(row, length) for row in rows]

    def drop(self, uids: Collection[int]) -> None:
        """Drop the index of rows."""
        for uid in uids:
            self._indexes.pop(uid, None)

    def _expected(self, row: DecodeRow, max_length: int) -> list[float]:
        index = self._indexes.setdefault(row.uid, NgramIndex(len(row.row.prompt)))
        complete = index.catch_up(row)
        return index.acceptance.expected(index.match, max_length) if complete and index.match else []

    def _draft(self, row: DecodeRow, length: int) -> list[int]:
        index = self._indexes.get(row.uid)
        return index.draft(length) if index is not None and len(index) >= row.length else []
