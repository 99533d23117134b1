"""Shared prefix: requests behind the same long system prompt, the first of which has to read it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.contenders import OwnStack
from tests.bench.plans import Ask, closed
from tests.bench.prompts import question, text_of
from tests.bench.samples import Figures, Sample, quantile
from tests.bench.scenarios.base import Scenario, Subject

_ANSWER = 8
_FOLLOWERS = 2


class SharedPrefix(Scenario):
    """The first, those after it, and one after the worker was started anew."""

    name = "prefix"
    rounds = 1

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """One request after another, so that each finds what the one before has left."""
        other, shared = (text_of(subject.sizes.prefix_tokens, next(subject.numbers), subject.model) for _ in range(2))
        subject.running.run(closed([[self._ask(subject, other)]]))  # the first of its length costs more on a GPU
        outcome, found = subject.measure(closed([[self._ask(subject, shared) for _ in range(1 + _FOLLOWERS)]]))
        first, second = (_ttft(sample) for sample in outcome.samples[:2])
        later = quantile(map(_ttft, outcome.samples[1:]), 0.5)
        yield (
            f"{subject.sizes.prefix_tokens} tokens",
            {**found, "first_ttft_s": first, "second_ttft_s": second, "ttft_p50_s": later},
        )
        if isinstance(subject.running, OwnStack):
            subject.running.restart_worker()
            subject.running.run(closed([[subject.ask(_ANSWER)]]))
            outcome, found = subject.measure(closed([[self._ask(subject, shared)]]))
            yield "after a restart", {**found, "first_ttft_s": first, "second_ttft_s": _ttft(outcome.samples[0])}

    def remark(self, figures: Figures) -> str:
        """By how much the first reader spares the next the work."""
        first, second = figures["first_ttft_s"], figures["second_ttft_s"]
        return f"first {first:.3f} s, this {second:.3f} s: {second / first:.2f} of it" if first else ""

    def _ask(self, subject: Subject, system: str) -> Ask:
        return Ask(question(next(subject.numbers), system), _ANSWER)


def _ttft(sample: Sample) -> float:
    return sample.ttft_s if sample.chunks else 0.0
