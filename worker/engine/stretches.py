"""Steps of batches of different sizes, compared: what is known of fewer rows, and what three stretches in a row prove.

Whatever else runs on a machine makes steps slower, never quicker. So what some number of rows gave in its quick steps
is what it can give; that others gave less may have had another cause, and is only a suspicion.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

_LIKE = 0.9
"""Fewer rows are compared where their contexts are not shorter than by this."""
_MANY_STEPS, _KEPT_STEPS = 8, 16
"""Of many rows, before and after: at least, and at most."""
_FEWER_STEPS, _WINDOW, _KEPT_FEWER = 5, 8, 32
"""Of fewer: at least; so many in a row are judged together, wherever they were quickest; and at most."""
_KNOWN_STEPS, _KNOWN_FOR_S = 2, 3600.0
"""A suspicion needs little."""
_SPAN_S = 300.0
"""Stretches that lie further apart are not compared."""
_NEAR, _FAR = 0.75, 0.5
"""Fewer than the first show well enough that they give no more, fewer than the second that they do."""
_PARTS = 16
"""By so many parts of the most rows fewer rows are told apart; one part less is fewer."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that did nothing but decode.

    Attributes:
        at: the moment of its end.
        context: tokens of the mean row.
        tokens: that it gave to all rows.
    """

    at: float
    seconds: float
    rows: int
    context: float
    tokens: int

    @property
    def speed(self) -> float:
        """Tokens a second in all."""
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Gain:
    """So many rows were so many times as fast in all as more of them."""

    rows: int
    than: int
    times: float


class Known:
    """What batches of each size gave lately."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[Step]] = {}

    def add(self, step: Step) -> None:
        """Take a step in."""
        size = round(2 * math.log2(step.rows))
        self._steps.setdefault(size, deque(maxlen=_KEPT_STEPS)).append(step)

    def gain(self, than: Stretches, now: float) -> Gain | None:
        """What the best of fewer rows gave, quick steps against quick steps; None: nothing is known."""
        context, speed = _context(than.before), _quick(than.before)
        fewer = [
            [s for s in steps if s.rows < than.most and s.context >= _LIKE * context and now - s.at < _KNOWN_FOR_S]
            for steps in self._steps.values()
        ]
        gains = [Gain(_rows(each), than.most, _quick(each) / speed) for each in fewer if len(each) >= _KNOWN_STEPS]
        return max(gains, key=lambda gain: gain.times, default=None)


@dataclass(slots=True)
class Stretches:
    """Many rows, fewer, and many again, as far as they have come."""

    most: int = 0
    before: deque[Step] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS))
    fewer: deque[Step] = field(default_factory=lambda: deque(maxlen=_KEPT_FEWER))
    after: list[Step] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether fewer rows may come: it is known how fast many are."""
        return len(self.before) >= _MANY_STEPS

    @property
    def least_s(self) -> float:
        """Time that the fewest steps of fewer rows take, were they as slow as those of many."""
        return _FEWER_STEPS * statistics.median(step.seconds for step in self.before)

    @property
    def enough(self) -> bool:
        """Whether fewer rows need no more steps: they are far fewer, or gave no more."""
        gain = self.gain
        return gain is not None and gain.rows <= (_FAR if gain.times > 1 else _NEAR) * self.most

    @property
    def gain(self) -> Gain | None:
        """What fewer rows gave in their slow steps, against many in their quick ones; None: too little is known."""
        if not self.fewer or len(self.before) < _MANY_STEPS:
            return None
        many = [self.before, self.after] if self.after else [self.before]
        speed, context = max(map(_quick, many)), max(map(_context, many))
        steps = list(self.fewer)
        windows = (steps[i : i + _WINDOW] for i in range(max(1, len(steps) - _WINDOW + 1)))
        gains = [
            Gain(_rows(each), self.most, _slow(each) / speed)
            for each in windows
            if len(each) >= _FEWER_STEPS and _context(each) >= _LIKE * context
        ]
        return max(gains, key=lambda gain: gain.times, default=None)

    def add(self, step: Step) -> Gain | None:
        """Take a step in; with the last of the third stretch, what all three say."""
        part = math.ceil(step.rows * _PARTS / self.most) if self.most else math.inf
        if part > _PARTS + 1 or step.at - self.before[-1].at > _SPAN_S:
            self.restart(step)
        elif part < _PARTS:
            self._fewer(step)
        elif self.gain is not None:
            self.after.append(step)
            return self._conclude() if len(self.after) == _MANY_STEPS else None
        else:
            self.fewer.clear()
            self.before.append(step)
        return None

    def restart(self, *steps: Step) -> None:
        """Forget all but these steps of many rows."""
        self.most = max((step.rows for step in steps), default=0)
        self.before = deque(steps, _KEPT_STEPS)
        self.fewer.clear()
        self.after.clear()

    def _fewer(self, step: Step) -> None:
        self.fewer.append(step)
        if len(self.before) < _MANY_STEPS and len(self.fewer) == _MANY_STEPS:
            self.restart(*self.fewer)  # there were many only for a moment

    def _conclude(self) -> Gain | None:
        gain = self.gain
        self.restart(*self.after)
        return gain


def _quick(steps: Iterable[Step]) -> float:
    return _quantile(steps, 0.75)


def _slow(steps: Iterable[Step]) -> float:
    return _quantile(steps, 0.25)


def _quantile(steps: Iterable[Step], part: float) -> float:
    speeds = sorted(step.speed for step in steps)
    return speeds[round(part * (len(speeds) - 1))]


def _context(steps: Iterable[Step]) -> float:
    return statistics.fmean(step.context for step in steps)


def _rows(steps: Iterable[Step]) -> int:
    return round(statistics.median(step.rows for step in steps))
