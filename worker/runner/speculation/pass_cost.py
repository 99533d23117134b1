"""What it takes to verify a guess, compared with a plain step of the same rows, as it was of late."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Final

LENGTHS: Final = (2, 4, 8, 16)
"""Of guesses, in tokens. Only these, so that what each costs is soon known."""

STALE = 512
"""After so many plain steps what a pass cost may be wrong, and half of what it cost more than one is believed."""

PLAIN_AFTER = 32
"""Verified guesses in succession, before a few steps are plain: nobody knows any more what those cost."""

_LEAST_PLAIN = 3
"""Plain steps to be timed before anything is compared with them."""


@dataclass(slots=True)
class _Width:
    """What passes over so many tokens took of late, their median, and how many plain steps ago the last was."""

    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    median_s: float = 0.0
    age: int = 0


class PassCosts:
    """What passes take, in plain steps. Medians: one that somebody else on the machine made long says nothing."""

    def __init__(self) -> None:
        self._plain_s: deque[float] = deque(maxlen=7)
        self._plain_median_s = 0.0  # kept, as it is asked for more often than it changes
        self._widths = {length: _Width() for length in LENGTHS}
        self._since_plain = 0

    def plain(self, seconds: float) -> None:
        """A step for one token took so long."""
        self._plain_s.append(seconds)
        self._plain_median_s = statistics.median(self._plain_s)
        self._since_plain = 0
        for width in self._widths.values():
            width.age += 1

    def verified(self, length: int, seconds: float) -> None:
        """A step that verified a guess of so many tokens took so long."""
        width = self._widths[length]
        width.took_s.append(seconds)
        width.median_s = statistics.median(width.took_s)
        width.age = 0
        self._since_plain += 1

    @property
    def known(self) -> bool:
        """Whether plain steps were timed, and not too long ago."""
        return len(self._plain_s) >= _LEAST_PLAIN and self._since_plain < PLAIN_AFTER and min(self._plain_s) > 0

    def of(self, length: int) -> float:
        """Of a step that verifies so many tokens; what was never tried is believed to cost no more than a plain one."""
        width = self._widths[length]
        if not width.took_s:
            return 1.0
        cost = width.median_s / self._plain_median_s
        return (1 + cost) / 2 if width.age > STALE else cost
