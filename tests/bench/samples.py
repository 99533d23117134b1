"""What was seen of each request, and the figures that are made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

Figures = dict[str, float]

TOGETHER_S = 0.0005
"""Pieces that a client reads within so short a time came together."""
_TELLING_S = 0.05


@dataclass(slots=True)
class Sample:
    """One request; all moments are seconds since the plan's start.

    Attributes:
        due_s: when it was to be sent: a load that is late itself does not make a server look fast.
        chunks: when each piece of text came.
        ended_s: when the whole answer was there; None when it never was.
        error: why not; empty when it was cut by the plan.
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
        """Seconds to the first piece of text; without one, for ever."""
        return self.chunks[0] - self.due_s if self.chunks else float("inf")

    @property
    def arrivals(self) -> list[float]:
        """When text came: pieces that were read together are one arrival, whoever put them together."""
        moments: list[float] = []
        for moment in self.chunks:
            if not moments or moment - moments[-1] > TOGETHER_S:
                moments.append(moment)
        return moments

    @property
    def gaps(self) -> list[float]:
        """Seconds between two arrivals."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def decode_s(self) -> float:
        """Seconds from the first piece to the last."""
        return self.chunks[-1] - self.chunks[0] if self.chunks else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a plan gave."""

    samples: list[Sample]
    wall_s: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made of one."""
        return cls([Sample(**each) for each in data["samples"]], data["wall_s"])

    def of(self, *kinds: str) -> list[Sample]:
        """The samples of some kinds."""
        return [sample for sample in self.samples if sample.kind in kinds]


def quantile(values: Iterable[float], q: float) -> float:
    """The q-quantile (nearest rank); 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] if ordered else 0.0


def figures(samples: Sequence[Sample], wall_s: float) -> Figures:
    """Speed and latencies of requests; latencies are those of whole answers."""
    whole = [sample for sample in samples if sample.ended_s is not None]
    first = [sample.ttft_s for sample in whole]
    gaps = [gap for sample in whole for gap in sample.gaps]
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
    """Tokens a second from the first token to the last: the speed without the wait. 0 when that was no time at all."""
    whole = [sample for sample in samples if sample.ended_s is not None]
    seconds = sum(sample.decode_s for sample in whole)
    return sum(sample.tokens - 1 for sample in whole) / seconds if seconds > _TELLING_S else 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """The latency that makes an answer a good one."""

    ttft_s: float
    gap_s: float

    def holds(self, sample: Sample) -> bool:
        """Whether the answer is whole, began in time, and went on in time on average."""
        per_token_s = sample.decode_s / max(sample.tokens - 1, 1)
        return sample.ended_s is not None and sample.ttft_s <= self.ttft_s and per_token_s <= self.gap_s


def goodput(samples: Sequence[Sample], bound: Bound, seconds: float) -> float:
    """Good answers a second, of what was asked within so many seconds."""
    return sum(map(bound.holds, samples)) / seconds


def capacity(outcome: Outcome) -> float:
    """Requests a second that a contender answers while every client of a closed loop is kept busy.

    What comes after the first client has run out of requests does not count: the batch is no longer full. A request
    half done by then counts by half.
    """
    last: dict[int, float] = {}
    for sample in outcome.samples:
        last[sample.client] = max(last.get(sample.client, 0.0), sample.ended_s or 0.0)
    full_until = min(last.values(), default=0.0)
    if not full_until:
        return 0.0
    done = sum(sum(moment <= full_until for moment in each.chunks) / len(each.chunks) for each in _begun(outcome))
    return done / full_until


def _begun(outcome: Outcome) -> list[Sample]:
    return [sample for sample in outcome.samples if sample.chunks]
