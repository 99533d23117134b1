"""Mixed: rows that run, and long prompts that arrive among them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise

from tests.bench.plans import Ask, Client, Plan
from tests.bench.prompts import question, text_of
from tests.bench.samples import Figures, Outcome, Sample, quantile
from tests.bench.scenarios.base import LeftOut, Scenario, Subject

RUNNING, LONG, QUIET = "running", "long", "quiet"
_ANSWER = 4
_ROW_TOKENS = 1000
_ROW_ASKS = 100
_BETWEEN = 40
"""Tokens of the short answer before each long prompt: while it is given, nothing is read."""


class Mixed(Scenario):
    """What long prompts do to the rows that run."""

    name = "mixed"
    rounds = 1

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """Rows in the background for as long as long prompts come, one at a time, with a quiet time before each."""
        sizes = subject.sizes
        rows = [
            Client([subject.ask(_ROW_TOKENS, kind=RUNNING) for _ in range(_ROW_ASKS)], background=True)
            for _ in range(sizes.running)
        ]
        coming: list[Ask] = []
        for _ in range(sizes.long_prompts):
            coming.append(subject.ask(_BETWEEN, kind=QUIET))
            text = text_of(sizes.long_tokens, next(subject.numbers), subject.model)
            coming.append(Ask(question(next(subject.numbers), text), _ANSWER, kind=LONG))
        outcome, found = subject.measure(Plan([*rows, Client(coming)]))
        yield f"{sizes.running} rows, {sizes.long_tokens} tokens", {**found, **disturbance(outcome)}

    def remark(self, figures: Figures) -> str:
        """The gaps while a long prompt is read, beside those of quiet times."""
        return (
            f"gap while a long prompt is read: p99 {figures['disturbed_gap_p99_s']:.3f} s, "
            f"{figures['disturbance']:.1f} x the quiet median of {figures['quiet_gap_p50_s']:.3f} s"
        )


def disturbance(outcome: Outcome) -> Figures:
    """The running rows' gaps in quiet times and while long prompts are read.

    Raises:
        LeftOut: there are none to speak of.
    """
    readings = [_reading(visit) for visit in outcome.of(QUIET, LONG)]
    long = [_reading(visit) for visit in outcome.of(LONG)]
    gaps = [gap for row in outcome.of(RUNNING) for gap in pairwise(row.arrivals)]
    quiet = [after - before for before, after in gaps if not _meets(before, after, readings)]
    disturbed = [after - before for before, after in gaps if _meets(before, after, long)]
    if not quiet or not disturbed:
        raise LeftOut("no gaps of running rows to compare: requests failed, or answers were too short")
    median, p99 = statistics.median(quiet), quantile(disturbed, 0.99)
    return {
        "quiet_gap_p50_s": median,
        "disturbed_gap_p99_s": p99,
        "disturbance": p99 / median,
        "long_ttft_p50_s": quantile((each.ttft_s for each in outcome.of(LONG) if each.chunks), 0.5),
    }


def _reading(visit: Sample) -> tuple[float, float]:
    """The time from a prompt's sending to its first token."""
    return visit.due_s, visit.due_s + visit.ttft_s


def _meets(before: float, after: float, spans: list[tuple[float, float]]) -> bool:
    """Whether a gap falls into one of the spans, were it with an end."""
    return any(before < end and after > start for start, end in spans)
