"""Shared prefix: requests with the same long system prompt; only the first has to prefill it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.bench.contenders import OwnStack
from tests.bench.plans import ChatRequest, closed
from tests.bench.prompts import question, text_of
from tests.bench.samples import Figures, Sample, quantile
from tests.bench.scenarios.base import Scenario, Subject

_ANSWER_TOKENS: Final = 8
_FOLLOWERS: Final = 2


class SharedPrefix(Scenario):
    """The first request, those after it, and one after a restart of the worker."""

    name = "prefix"
    rounds = 1

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """One request after another, so that each finds the prefix that an earlier one has cached."""
        other, shared = (text_of(subject.sizes.prefix_tokens, next(subject.numbers), subject.model) for _ in range(2))
        # The first prompt of a length is slower on a GPU.
        subject.running.run(closed([[self._request(subject, other)]]))
        outcome, found = subject.measure(closed([[self._request(subject, shared) for _ in range(1 + _FOLLOWERS)]]))
        first, second = (_ttft(sample) for sample in outcome.samples[:2])
        later = quantile(map(_ttft, outcome.samples[1:]), 0.5)
        yield (
            f"{subject.sizes.prefix_tokens} tokens",
            {**found, "first_ttft_s": first, "second_ttft_s": second, "ttft_p50_s": later},
        )
        if isinstance(subject.running, OwnStack):
            subject.running.restart_worker()
            subject.running.run(closed([[subject.request(_ANSWER_TOKENS)]]))
            outcome, found = subject.measure(closed([[self._request(subject, shared)]]))
            yield "after a restart", {**found, "first_ttft_s": first, "second_ttft_s": _ttft(outcome.samples[0])}

    def remark(self, figures: Figures) -> str:
        """The time to first token with the cached prefix, as a fraction of that without."""
        first, second = figures["first_ttft_s"], figures["second_ttft_s"]
        return f"TTFT {second:.3f} s, {second / first:.2f} of the first request's {first:.3f} s" if first else ""

    def _request(self, subject: Subject, system: str) -> ChatRequest:
        return ChatRequest(question(next(subject.numbers), system), _ANSWER_TOKENS)


def _ttft(sample: Sample) -> float:
    return sample.ttft_s if sample.chunks else 0.0
