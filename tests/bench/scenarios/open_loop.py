"""Open loop: requests arrive as a Poisson process, whether or not earlier ones have been answered.

The rates are fractions of each contender's own capacity, which is measured first. Half of the requests are of the
batch class, which only this stack has (the others serve all in order). Latencies and goodput are those of the
interactive half.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from tests.bench.plans import ChatRequest, closed, opened
from tests.bench.samples import Figures, Outcome, capacity, figures, goodput, quantile
from tests.bench.scenarios.base import NotMeasured, Scenario, Sizes, Subject

INTERACTIVE, BATCH = "interactive", "batch"
_REQUESTS_EACH: Final = 4
_BATCH_SHARE: Final = 0.5


def poisson(per_s: float, seconds: float, seed: int) -> list[float]:
    """Arrival times, in seconds from the start, of a Poisson process; equal seeds give equal times."""
    draw = random.Random(seed)
    times: list[float] = []
    time = draw.expovariate(per_s)
    while time < seconds:
        times.append(time)
        time += draw.expovariate(per_s)
    return times


class Open(Scenario):
    """Load below and above the capacity, which tests the queue."""

    name = "open"
    rounds = 1

    def slots(self, sizes: Sizes) -> int:
        """As many as the clients that measure the capacity."""
        return sizes.slots_busy

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """The capacity, then each load."""
        sizes = subject.sizes
        draw = random.Random(len(sizes.loads))
        plan = closed([[_request(subject, draw) for _ in range(_REQUESTS_EACH)] for _ in range(sizes.slots_busy)])
        outcome, found = subject.measure(plan)
        per_s = capacity(outcome)
        yield "capacity", {**found, "capacity_per_s": per_s}
        if not per_s:
            raise NotMeasured("no capacity: requests failed")
        for load in sizes.loads:
            times = poisson(per_s * load, sizes.open_s, seed=round(load * 100))
            outcome, found = subject.measure(opened([_request(subject, draw, at_s) for at_s in times]))
            offered = {"load": load, "offered_per_s": per_s * load, "capacity_per_s": per_s}
            yield f"{load:.0%} of capacity", {**found, **offered, **_by_class(outcome, sizes)}

    def remark(self, figures: Figures) -> str:
        """Rate, goodput, the batch class's latency, and failures."""
        if "load" not in figures:
            return f"capacity {figures['capacity_per_s']:.2f}/s"
        return (
            f"{figures['offered_per_s']:.2f}/s offered, goodput {figures['goodput_per_s']:.2f}/s, "
            f"batch TTFT p50 {figures['batch_ttft_p50_s']:.2f} s, {figures['failed']:.0f} lost"
        )


def _request(subject: Subject, draw: random.Random, at_s: float = 0.0) -> ChatRequest:
    """Half to one and a half times the usual number of tokens, so that rows end at different times."""
    tokens = max(1, round(subject.sizes.tokens * draw.uniform(0.5, 1.5)))
    batch = draw.random() < _BATCH_SHARE
    return subject.request(tokens, kind=BATCH if batch else INTERACTIVE, at_s=at_s, batch=batch)


def _by_class(outcome: Outcome, sizes: Sizes) -> Figures:
    interactive, batch = outcome.of(INTERACTIVE), outcome.of(BATCH)
    latencies = figures(interactive, outcome.wall_s)
    batch_ttft_s = [sample.ttft_s for sample in batch if sample.ended_s is not None]
    return {
        **{name: latencies[name] for name in ("ttft_p50_s", "ttft_p99_s", "gap_p50_s", "gap_p99_s")},
        "goodput_per_s": goodput(interactive, sizes.target, sizes.open_s),
        "interactive": len(interactive),
        "batch_ttft_p50_s": quantile(batch_ttft_s, 0.5),
        "batch_ttft_p99_s": quantile(batch_ttft_s, 0.99),
    }
