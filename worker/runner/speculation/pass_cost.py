"""What a pass over several tokens of a row takes next to a plain decode step, measured once while the model warms.

Online medians of every kind of step were here before. They adapt to a machine that becomes slower, but a slower machine
changes both sides of the ratio alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

LENGTHS: Final = (2, 4, 8, 16)
"""Of drafts, in tokens. Only these, so that each can be measured."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of a step, by the tokens in its pass; only their ratios matter.

    Attributes:
        seconds: by tokens of the pass, behind a short context; 1 is a plain decode step of one row.
        drawn: of sampling a token with a temperature, beyond what a greedy choice takes.
        behind: of each token for each one in the cache before it.
    """

    seconds: Mapping[int, float]
    drawn: float = 0.0
    behind: float = 0.0

    def ratio(self, rows: int, drawn: int, length: int, position: int) -> float:
        """What verifying drafts of `length` tokens costs, in plain steps.

        Args:
            rows: of the batch.
            drawn: those of them that have a temperature.
            position: tokens that each has in the cache.
        """
        wide = 1 + length
        return self._of(rows * wide, drawn * wide, position) / self._of(rows, drawn, position)

    def _of(self, tokens: int, drawn: int, position: int) -> float:
        return self._interpolated(tokens) + drawn * self.drawn + tokens * position * self.behind

    def _interpolated(self, tokens: int) -> float:
        known = sorted(self.seconds.items())
        for (low, least), (high, most) in pairwise(known):
            if tokens <= high or high == known[-1][0]:
                slope = max(most - least, 0.0) / (high - low)
                return max(least + (tokens - low) * slope, 1e-9)
        return max(known[0][1], 1e-9)


UNKNOWN: Final = PassCost({1: 1.0, 1 + LENGTHS[-1]: 1.0})
"""Nothing was measured: a pass over more tokens costs no more."""
