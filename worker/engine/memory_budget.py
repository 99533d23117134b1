"""How many rows fit into the memory for caches: counted at the length that they are expected to reach.

Counting rows at their longest would leave the batch almost empty where clients ask for `max_tokens: 32000` and get
500. So a row is admitted at its expected length, and the scheduler preempts rows when that was too little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto

from worker.engine.sequence import Sequence
from worker.runner.base import ModelRunner

GROWTH = 256
"""Tokens by which caches grow at a time."""
FIRST_ANSWER = 256
"""Expected tokens of an answer before any has ended."""
_MEAN_OF = 64
"""The newest answer has at least 1/64 of the weight in the mean."""
_SAMPLE = 4 * GROWTH


class Fit(Enum):
    """Whether there is memory for one more row."""

    NOW = auto()
    LATER = auto()
    """When others have ended."""
    NEVER = auto()
    """It would not fit even alone."""


class MemoryBudget:
    """The memory that one model's rows and prefixes share.

    Attributes:
        limit_bytes: what rows and prefixes may take now.
        hoped_bytes: the limit to be expected again soon, if higher. A row that fits into it waits instead of failing.
        answer_tokens: running mean of the lengths of finished answers.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.limit_bytes = self.hoped_bytes = runner.cache_bytes
        self.answer_tokens = float(FIRST_ANSWER)
        self._runner = runner
        self._answers = 1

    def grant(self, limit_bytes: int, hoped_bytes: int = 0) -> None:
        """Set the limits."""
        self.limit_bytes, self.hoped_bytes = limit_bytes, max(limit_bytes, hoped_bytes)

    def answered(self, tokens: int) -> None:
        """Note the length of a finished answer."""
        self._answers = min(self._answers + 1, _MEAN_OF)
        self.answer_tokens += (tokens - self.answer_tokens) / self._answers

    def expected(self, sequence: Sequence) -> int:
        """Expected length of a row: its present length and one more mean answer."""
        return sequence.length + min(sequence.remaining, max(GROWTH, int(self.answer_tokens)))

    def fits(self, sequence: Sequence, rows: Collection[Sequence], encoding: Iterable[Sequence] = ()) -> Fit:
        """Whether a row fits beside others.

        Args:
            encoding: those of the others whose images are not encoded yet.
        """
        if self._runner.batch_bytes([sequence.longest]) > self.hoped_bytes:
            return Fit.NEVER
        needed = self._runner.batch_bytes([self.expected(each) for each in (*rows, sequence)])
        if rows:  # a row alone is encoded before its cache grows, so the peaks do not add up
            needed += self._encoding_bytes((*encoding, sequence))
        return Fit.NOW if needed <= self.limit_bytes else Fit.LATER

    def is_short(self, rows: Collection[Sequence]) -> bool:
        """Whether rows, all grown by one step of their caches, no longer fit."""
        lengths = [min(each.length + GROWTH, each.longest) for each in rows]
        return self._runner.batch_bytes(lengths) > self.hoped_bytes

    def left(self, rows: Iterable[Sequence], encoding: Iterable[Sequence] = ()) -> int:
        """Bytes that these rows are expected to leave, not below zero."""
        needed = self._runner.batch_bytes([self.expected(each) for each in rows])
        return max(0, self.limit_bytes - needed - self._encoding_bytes(encoding))

    def tokens_in(self, free_bytes: int) -> int:
        """Tokens of rows that fit into `free_bytes`."""
        each = (self._runner.row_bytes(2 * _SAMPLE) - self._runner.row_bytes(_SAMPLE)) / _SAMPLE
        return int(free_bytes / max(each, 1))

    def _encoding_bytes(self, sequences: Iterable[Sequence]) -> int:
        """Images are encoded one after another."""
        return max((self._runner.encode_bytes(each.prompt.media) for each in sequences), default=0)
