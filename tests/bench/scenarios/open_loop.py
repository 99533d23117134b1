"""Open loop: requests come as a Poisson process, whether or not those before them have been answered.

The rates are parts of each contender's own capacity, which is measured first. Half of the requests may wait (batch
class, which only this stack knows; the others serve all in order); latencies and goodput are those of the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.bench.arrivals import poisson
from tests.bench.plans import Ask, closed, opened
from tests.bench.samples import Figures, Outcome, capacity, figures, goodput, quantile
from tests.bench.scenarios.base import LeftOut, Scenario, Sizes, Subject

INTERACTIVE, BATCH = "interactive", "batch"
_REQUESTS_EACH = 4
_BATCH_SHARE = 0.5


class Open(Scenario):
    """The queue's test."""

    name = "open"
    rounds = 1

    def slots(self, sizes: Sizes) -> int:
        """As many as clients measure the capacity."""
        return sizes.slots_busy

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """The capacity, then each load."""
        sizes = subject.sizes
        draw = random.Random(len(sizes.loads))
        plan = closed([[_ask(subject, draw) for _ in range(_REQUESTS_EACH)] for _ in range(sizes.slots_busy)])
        outcome, found = subject.measure(plan)
        per_s = capacity(outcome)
        yield "capacity", {**found, "capacity_per_s": per_s}
        if not per_s:
            raise LeftOut("no capacity: requests failed")
        for load in sizes.loads:
            moments = poisson(per_s * load, sizes.open_s, seed=round(load * 100))
            asks = [_ask(subject, draw, at_s) for at_s in moments]
            outcome, found = subject.measure(opened(asks))
            offered = {"load": load, "offered_per_s": per_s * load, "capacity_per_s": per_s}
            yield f"{load:.0%} of capacity", {**found, **offered, **_by_class(outcome, sizes)}

    def remark(self, figures: Figures) -> str:
        """Rate, goodput, and what became of the rest."""
        if "load" not in figures:
            return f"capacity {figures['capacity_per_s']:.2f}/s"
        return (
            f"{figures['offered_per_s']:.2f}/s offered, goodput {figures['goodput_per_s']:.2f}/s, "
            f"batch TTFT p50 {figures['batch_ttft_p50_s']:.2f} s, {figures['failed']:.0f} lost"
        )


def _ask(subject: Subject, draw: random.Random, at_s: float = 0.0) -> Ask:
    """From half to one and a half times the usual answer, so that rows leave at different times."""
    tokens = max(1, round(subject.sizes.tokens * draw.uniform(0.5, 1.5)))
    batch = draw.random() < _BATCH_SHARE
    return subject.ask(tokens, kind=BATCH if batch else INTERACTIVE, at_s=at_s, batch=batch)


def _by_class(outcome: Outcome, sizes: Sizes) -> Figures:
    interactive, batch = outcome.of(INTERACTIVE), outcome.of(BATCH)
    latencies = figures(interactive, outcome.wall_s)
    return {
        **{name: latencies[name] for name in ("ttft_p50_s", "ttft_p99_s", "gap_p50_s", "gap_p99_s")},
        "goodput_per_s": goodput(interactive, sizes.bound, sizes.open_s),
        "interactive": len(interactive),
        "batch_ttft_p50_s": quantile((each.ttft_s for each in batch if each.ended_s is not None), 0.5),
        "batch_ttft_p99_s": quantile((each.ttft_s for each in batch if each.ended_s is not None), 0.99),
    }
