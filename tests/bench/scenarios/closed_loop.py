"""Closed loop: N clients start together, and each waits for its answer."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.plans import closed
from tests.bench.samples import Figures, decode_speed
from tests.bench.scenarios.base import SLOTS, Scenario, Sizes, Subject


def case_name(clients: int) -> str:
    """The name of a case."""
    return f"{clients} client{'s' if clients > 1 else ''}"


class Closed(Scenario):
    """Many concurrent clients with one request each."""

    name = "closed"

    def slots(self, sizes: Sizes) -> int:
        """As many as there are clients."""
        return max(SLOTS, *sizes.clients)

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """A burst for each number of clients."""
        for clients in subject.sizes.clients:
            _, found = subject.measure(closed([[subject.request()] for _ in range(clients)]))
            yield case_name(clients), {"clients": clients, **found}


class Single(Scenario):
    """One client, and no other load."""

    name = "single"

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """Several requests, one after another."""
        outcome, found = subject.measure(closed([[subject.request() for _ in range(subject.sizes.alone)]]))
        yield case_name(1), {"clients": 1, **found, "decode_tokens_per_s": decode_speed(outcome.samples)}

    def remark(self, figures: Figures) -> str:
        """The decode speed, and how much of the memory bandwidth's limit it reaches."""
        speed, limit = figures["decode_tokens_per_s"], figures.get("bandwidth_tokens_per_s")
        part = f", {speed / limit:.0%} of the memory bandwidth's {limit:.1f}" if limit else ""
        return f"{speed:.1f} tok/s after the first token{part}" if speed else ""
