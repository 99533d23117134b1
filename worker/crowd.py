"""How many rows are worth decoding together, found while they decode.

More rows give more tokens a second, until their contexts are so long that a step costs more than the rows add. Where
that is depends on the model and the device. So the tokens a second of each number of rows are kept, by the doublings
of the length of their contexts. A row more is not admitted where so many were slower in all than some fewer. What is
known grows old, so that it is tried again, and one row is always worth its while.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

WORSE = 0.9
"""More rows must give less than this of what fewer gave: steps differ by some per cent anyhow."""
LEAST_STEPS = 4
"""Measured before a number of rows is judged."""
KNOWN_FOR_S = 60.0
"""After that it is tried again."""


@dataclass(slots=True)
class _Rate:
    """What some number of rows gave lately, in tokens a second."""

    measured_at: float = 0.0
    each: deque[float] = field(default_factory=lambda: deque(maxlen=9))


class Crowd:
    """Knows what batches of each size gave.

    Args:
        clock: tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: dict[tuple[int, int], _Rate] = {}
        self._stepped_at = 0.0
        self._before: int | None = None

    def stepped(self, rows: int, held: int, undisturbed: bool) -> None:
        """A step gave so many rows a token each; their contexts are so many tokens in all; nothing else was done."""
        last, self._stepped_at = self._stepped_at, self._clock()
        before, self._before = self._before, rows if undisturbed else None
        if not rows or not undisturbed or before != rows or self._stepped_at <= last:
            return  # the device may be a step behind: two alike are needed to know what the second was
        rate = self._rates.setdefault(_key(rows, held), _Rate())
        if self._stepped_at - rate.measured_at > KNOWN_FOR_S:
            rate.each.clear()
        rate.measured_at = self._stepped_at
        rate.each.append(rows / (self._stepped_at - last))

    def worth(self, rows: int, held: int) -> bool:
        """Whether so many rows with such contexts give about as much as any fewer, as far as it is known."""
        known = [rate for few in range(1, rows + 1) if (rate := self._known(few, held * few // rows)) is not None]
        return not known or known[-1] >= WORSE * max(known)

    def _known(self, rows: int, held: int) -> float | None:
        rate = self._rates.get(_key(rows, held))
        if rate is None or len(rate.each) < LEAST_STEPS or self._clock() - rate.measured_at > KNOWN_FOR_S:
            return None
        return statistics.median(rate.each)


def _key(rows: int, held: int) -> tuple[int, int]:
    return rows, (held // rows).bit_length()
