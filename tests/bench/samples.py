"""Measurements of each request, and the figures that are computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

Figures = dict[str, float]

TOGETHER_S = 0.0005
"""Chunks that a client reads within this time arrived together."""
_MIN_DECODE_S = 0.05
"""A shorter decode time gives no meaningful speed."""


@dataclass(slots=True)
class Sample:
    """One request; all times are seconds since the start of the plan.

    Attributes:
        due_s: when it was due to be sent: a load generator that is late must not make a server look fast.
        chunks: when each piece of text arrived.
        ended_s: when the answer was complete; None if it never was.
        error: why it was not; empty if the plan cancelled it.
    """

    client: int
    kind: str
    due_s: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    ended_s: float | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first piece of text; infinite without one."""
        return self.chunks[0] - self.due_s if self.chunks else float("inf")

    @property
    def arrivals(self) -> list[float]:
        """When text arrived: chunks that were read together count as one arrival."""
        times: list[float] = []
        for time in self.chunks:
            if not times or time - times[-1] > TOGETHER_S:
                times.append(time)
        return times

    @property
    def gaps(self) -> list[float]:
        """Seconds between successive arrivals."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def decode_s(self) -> float:
        """Seconds from the first chunk to the last."""
        return self.chunks[-1] - self.chunks[0] if self.chunks else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a plan."""

    samples: list[Sample]
    wall_s: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read the output of `dataclasses.asdict`."""
        return cls([Sample(**each) for each in data["samples"]], data["wall_s"])

    def of(self, *kinds: str) -> list[Sample]:
        """The samples of these kinds."""
        return [sample for sample in self.samples if sample.kind in kinds]


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile (nearest rank); 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] if ordered else 0.0


def figures(samples: Sequence[Sample], wall_s: float) -> Figures:
    """Speed and latencies of requests; only complete answers count for latencies."""
    complete = [sample for sample in samples if sample.ended_s is not None]
    first = [sample.ttft_s for sample in complete]
    gaps = [gap for sample in complete for gap in sample.gaps]
    tokens = sum(sample.tokens for sample in samples)
    return {
        "requests": len(samples),
        "failed": sum(bool(sample.error) for sample in samples),
        "tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
        "ttft_p50_s": quantile(first, 0.5),
        "ttft_p99_s": quantile(first, 0.99),
        "gap_p50_s": quantile(gaps, 0.5),
        "gap_p99_s": quantile(gaps, 0.99),
    }


def decode_speed(samples: Iterable[Sample]) -> float:
    """Tokens per second from the first token to the last; 0 if that time is too short to tell."""
    complete = [sample for sample in samples if sample.ended_s is not None]
    seconds = sum(sample.decode_s for sample in complete)
    return sum(sample.tokens - 1 for sample in complete) / seconds if seconds > _MIN_DECODE_S else 0.0


@dataclass(frozen=True, slots=True)
class LatencyTarget:
    """The latency of answers that count for goodput."""

    ttft_s: float
    gap_s: float

    def met_by(self, sample: Sample) -> bool:
        """Whether the answer is complete, its first token was in time, and the others were on average."""
        per_token_s = sample.decode_s / max(sample.tokens - 1, 1)
        return sample.ended_s is not None and sample.ttft_s <= self.ttft_s and per_token_s <= self.gap_s


def goodput(samples: Sequence[Sample], target: LatencyTarget, seconds: float) -> float:
    """Answers per second that meet the target, of requests that were due within this many seconds."""
    return sum(map(target.met_by, samples)) / seconds


def capacity(outcome: Outcome) -> float:
    """Requests per second that a contender answers while all clients of a closed loop are busy.

    Only the time until the first client has no request left counts: after that the batch is not full. A request that
    is half done by then counts as half.
    """
    last: dict[int, float] = {}
    for sample in outcome.samples:
        last[sample.client] = max(last.get(sample.client, 0.0), sample.ended_s or 0.0)
    full_until = min(last.values(), default=0.0)
    if not full_until:
        return 0.0
    begun = (sample.chunks for sample in outcome.samples if sample.chunks)
    done = sum(sum(time <= full_until for time in chunks) / len(chunks) for chunks in begun)
    return done / full_until
