"""Whether a quantity grows: a robust line through its samples, and the limit of its slope."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

Point = tuple[float, float]
"""Seconds since the start of the run, value."""

_MAX_POINTS: Final = 200
"""Points that are compared with each other; of more, every n-th is taken."""
HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest growth per hour that counts as flat: an amount, or a share of the median, whichever is larger."""

    amount: float
    share: float = 0.0

    def of(self, level: float) -> float:
        """The limit for a quantity with this median."""
        return max(self.amount, self.share * level)


@dataclass(frozen=True, slots=True)
class Fit:
    """A line through samples.

    Attributes:
        span_s: time from the first to the last sample.
        level: median of the samples.
        per_hour: slope.
        limit: the largest slope that counts as flat.
        judged: whether the samples span enough time for a verdict.
    """

    samples: int
    span_s: float
    level: float
    per_hour: float
    limit: float
    judged: bool

    @property
    def flat(self) -> bool:
        """Whether the quantity does not grow, as far as the samples show."""
        return not self.judged or self.per_hour <= self.limit


def fit(points: Sequence[Point], limit: Limit, min_span_s: float) -> Fit | None:
    """Fit a line with Theil and Sen's method: the median of the slopes between all pairs of points.

    Outliers, such as garbage collections and bursts of load, do not affect it. Returns None for fewer than two points.
    """
    if len(points) < 2:
        return None
    level, span_s = statistics.median(value for _, value in points), points[-1][0] - points[0][0]
    thinned = points[:: -(-len(points) // _MAX_POINTS)]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(thinned, 2) if t > s]
    per_hour = statistics.median(slopes) * HOUR_S if slopes else 0.0
    return Fit(len(points), span_s, level, per_hour, limit.of(level), span_s >= min_span_s)
