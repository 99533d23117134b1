"""The cost of a pass over several tokens per row, relative to a plain decode step. Measured once, during warm-up.

An earlier version kept running medians of every type of step. They adapt to a machine that becomes slower, but that
changes both sides of the ratio equally.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

LENGTHS: Final = (2, 4, 8, 16)
"""Possible draft lengths in tokens. There are few, so that each can be measured."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of a step, by the number of tokens in its pass. Only ratios matter.

    Attributes:
        seconds: seconds by tokens per pass, after a short context; 1 token is a plain decode step of one row.
        sampling: additional seconds per token to sample with a temperature instead of greedily.
        attention: seconds per pair of a token of the pass and a token in the cache.
    """

    seconds: Mapping[int, float]
    sampling: float = 0.0
    attention: float = 0.0

    def ratio(self, rows: int, sampled_rows: int, length: int, position: int, drafting_s: float = 0.0) -> float:
        """Return the cost of verifying drafts of `length` tokens, in plain decode steps.

        Args:
            rows: number of rows in the batch.
            sampled_rows: number of rows with a temperature.
            position: number of tokens that each row has in the cache.
            drafting_s: seconds that proposing the drafts takes.
        """
        width = 1 + length
        plain = self._pass_seconds(rows, sampled_rows, position)
        return (self._pass_seconds(rows * width, sampled_rows * width, position) + drafting_s) / plain

    def _pass_seconds(self, tokens: int, sampled: int, position: int) -> float:
        return self._interpolated(tokens) + sampled * self.sampling + tokens * position * self.attention

    def _interpolated(self, tokens: int) -> float:
        points = sorted(self.seconds.items())
        for (low, low_s), (high, high_s) in pairwise(points):
            if tokens <= high or high == points[-1][0]:
                slope = max(high_s - low_s, 0.0) / (high - low)
                return max(low_s + (tokens - low) * slope, 1e-9)
        return max(points[0][1], 1e-9)


UNKNOWN: Final = PassCost({1: 1.0, 1 + LENGTHS[-1]: 1.0})
"""Used when nothing was measured: a pass over more tokens costs no more."""
