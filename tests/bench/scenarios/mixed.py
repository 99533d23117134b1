"""Mixed: rows that decode, and long prompts that arrive meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from tests.bench.plans import ChatRequest, Client, Plan
from tests.bench.prompts import question, text_of
from tests.bench.samples import Figures, Outcome, Sample, quantile
from tests.bench.scenarios.base import NotMeasured, Scenario, Subject

RUNNING, LONG, QUIET = "running", "long", "quiet"
_ANSWER_TOKENS: Final = 4
_ROW_TOKENS: Final = 1000
_ROW_REQUESTS: Final = 100
_QUIET_TOKENS: Final = 40
"""Tokens of the short answer before each long prompt: nothing is prefilled during that time."""


class Mixed(Scenario):
    """How much long prompts delay the rows that decode."""

    name = "mixed"
    rounds = 1

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """Background rows decode while long prompts arrive one at a time, with a quiet period before each."""
        sizes = subject.sizes
        rows = [
            Client([subject.request(_ROW_TOKENS, kind=RUNNING) for _ in range(_ROW_REQUESTS)], background=True)
            for _ in range(sizes.running)
        ]
        arriving: list[ChatRequest] = []
        for _ in range(sizes.long_prompts):
            arriving.append(subject.request(_QUIET_TOKENS, kind=QUIET))
            text = text_of(sizes.long_tokens, next(subject.numbers), subject.model)
            arriving.append(ChatRequest(question(next(subject.numbers), text), _ANSWER_TOKENS, kind=LONG))
        outcome, found = subject.measure(Plan([*rows, Client(arriving)]))
        yield f"{sizes.running} rows, {sizes.long_tokens} tokens", {**found, **disturbance(outcome)}

    def remark(self, figures: Figures) -> str:
        """The gaps during prefill, compared with those of quiet periods."""
        return (
            f"gap during the prefill of a long prompt: p99 {figures['disturbed_gap_p99_s']:.3f} s, "
            f"{figures['disturbance']:.1f} x the quiet median of {figures['quiet_gap_p50_s']:.3f} s"
        )


def disturbance(outcome: Outcome) -> Figures:
    """The running rows' gaps in quiet periods and during the prefill of long prompts.

    Raises:
        NotMeasured: there are none.
    """
    prefills = [_prefill(sample) for sample in outcome.of(QUIET, LONG)]
    long_prefills = [_prefill(sample) for sample in outcome.of(LONG)]
    gaps = [gap for row in outcome.of(RUNNING) for gap in pairwise(row.arrivals)]
    quiet = [after - before for before, after in gaps if not _overlaps(before, after, prefills)]
    disturbed = [after - before for before, after in gaps if _overlaps(before, after, long_prefills)]
    if not quiet or not disturbed:
        raise NotMeasured("no gaps of running rows to compare: requests failed, or answers were too short")
    median, p99 = statistics.median(quiet), quantile(disturbed, 0.99)
    return {
        "quiet_gap_p50_s": median,
        "disturbed_gap_p99_s": p99,
        "disturbance": p99 / median,
        "long_ttft_p50_s": quantile((sample.ttft_s for sample in outcome.of(LONG) if sample.chunks), 0.5),
    }


def _prefill(sample: Sample) -> tuple[float, float]:
    """When a prompt was sent, and when its first token came."""
    return sample.due_s, sample.due_s + sample.ttft_s


def _overlaps(before: float, after: float, spans: list[tuple[float, float]]) -> bool:
    """Whether a gap overlaps one of the spans."""
    return any(before < end and after > start for start, end in spans)
