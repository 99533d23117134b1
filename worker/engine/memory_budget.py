"""Decides how many rows fit into the memory for caches, by the length that they are expected to reach.

If rows were counted at their maximum length, the batch would stay almost empty where clients send `max_tokens: 32000`
and get answers of 500 tokens. So a row is admitted by its expected length, and the scheduler preempts rows if they grow
beyond.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto
from typing import Final

from worker.engine.sequence import Sequence
from worker.runner.base import ModelRunner

GROWTH: Final = 256
"""Tokens by which caches grow at a time."""
INITIAL_ANSWER_TOKENS: Final = 256
"""Expected tokens of an answer before any has ended."""
_MEAN_WINDOW: Final = 64
"""The newest answer has at least 1/64 of the weight in the mean."""
_SAMPLE_TOKENS: Final = 4 * GROWTH


class Fit(Enum):
    """Whether there is memory for one more row."""

    NOW = auto()
    LATER = auto()
    """After other rows have ended."""
    NEVER = auto()
    """It would not fit even alone."""


class MemoryBudget:
    """The memory that one model's rows and prefixes share.

    Attributes:
        limit_bytes: what rows and prefixes may take now.
        future_limit_bytes: what they may take again soon, if more. A row that fits into this waits instead of failing,
            and running rows are not preempted before they exceed it.
        answer_tokens: running mean of the lengths of finished answers.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.limit_bytes = self.future_limit_bytes = runner.cache_bytes
        self.answer_tokens = float(INITIAL_ANSWER_TOKENS)
        self._runner = runner
        self._answers = 1

    def set_limit(self, limit_bytes: int, future_limit_bytes: int = 0) -> None:
        """Set both limits. The future limit is at least the present one."""
        self.limit_bytes, self.future_limit_bytes = limit_bytes, max(limit_bytes, future_limit_bytes)

    def add_answer(self, tokens: int) -> None:
        """Add the length of a finished answer to the mean."""
        self._answers = min(self._answers + 1, _MEAN_WINDOW)
        self.answer_tokens += (tokens - self.answer_tokens) / self._answers

    def expected_length(self, sequence: Sequence) -> int:
        """Return a row's present length plus one mean answer, at most its maximum length."""
        return sequence.length + min(sequence.remaining, max(GROWTH, int(self.answer_tokens)))

    def fits(self, sequence: Sequence, rows: Collection[Sequence], encoding: Iterable[Sequence] = ()) -> Fit:
        """Return whether a row fits in addition to the rows of the batch.

        Args:
            encoding: the rows of the batch whose images are not encoded yet.
        """
        if self._runner.batch_bytes([sequence.max_length]) > self.future_limit_bytes:
            return Fit.NEVER
        needed = self._runner.batch_bytes([self.expected_length(each) for each in (*rows, sequence)])
        if rows:  # the images of a single row are encoded before its cache grows, so the two peaks do not add up
            needed += self._encoding_bytes((*encoding, sequence))
        return Fit.NOW if needed <= self.limit_bytes else Fit.LATER

    def is_exceeded(self, rows: Collection[Sequence]) -> bool:
        """Return whether rows would not fit after their caches have grown once more."""
        lengths = [min(each.length + GROWTH, each.max_length) for each in rows]
        return self._runner.batch_bytes(lengths) > self.future_limit_bytes

    def free_bytes(self, rows: Iterable[Sequence], encoding: Iterable[Sequence] = ()) -> int:
        """Return the bytes that rows are expected to leave, at least 0."""
        needed = self._runner.batch_bytes([self.expected_length(each) for each in rows])
        return max(0, self.limit_bytes - needed - self._encoding_bytes(encoding))

    def tokens_in(self, free_bytes: int) -> int:
        """Return the number of cached tokens that fit into `free_bytes`."""
        growth_bytes = self._runner.row_bytes(2 * _SAMPLE_TOKENS) - self._runner.row_bytes(_SAMPLE_TOKENS)
        return int(free_bytes / max(growth_bytes / _SAMPLE_TOKENS, 1))

    def _encoding_bytes(self, sequences: Iterable[Sequence]) -> int:
        """Return the memory for encoding images. They are encoded one after another."""
        return max((self._runner.encode_bytes(each.prompt.media) for each in sequences), default=0)
