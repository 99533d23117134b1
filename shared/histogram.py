"""Histograms that a worker keeps, announces through Redis, and the API exports for Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from shared.wire import known_fields


@dataclass(slots=True)
class Histogram:
    """How often values fell between bounds, since the start of the worker.

    Attributes:
        bounds: upper bounds of the buckets, ascending, inclusive. A last bucket holds everything above.
        priority: class of the jobs that were observed; empty if classes are not distinguished.
        counts: observations per bucket, not cumulative; one more than `bounds`.
        sum: of all observed values.
    """

    name: str
    bounds: tuple[float, ...]
    priority: str = ""
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Self:
        """Parse the fields as JSON values, also those of another version.

        Raises:
            ValueError, TypeError, KeyError: the data is no histogram.
        """
        known = known_fields(cls, dict(data))
        bounds, counts = tuple(map(float, known["bounds"])), [int(count) for count in known["counts"]]
        if len(counts) != len(bounds) + 1 or list(bounds) != sorted(bounds):
            raise ValueError(f"histogram {known['name']!r}: its counts do not fit its bounds")
        return cls(**known | {"bounds": bounds, "counts": counts, "sum": float(known["sum"])})


def quantile(share: float, bounds: Sequence[float], counts: Iterable[float]) -> float | None:
    """Estimate a quantile as Prometheus does, by interpolation inside a bucket; None without observations.

    Args:
        share: 0.5 for the median.
        counts: observations per bucket, such as the difference of two readings.
    """
    each = [max(0, count) for count in counts]
    rank, seen = share * sum(each), 0.0
    if not sum(each):
        return None
    for index, count in enumerate(each[:-1]):
        if count and seen + count >= rank:
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - seen) / count
        seen += count
    return bounds[-1]
