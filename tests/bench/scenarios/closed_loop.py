"""Closed loop: so many clients begin at the same moment, and each waits for its answer."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.plans import closed
from tests.bench.samples import Figures, decode_speed
from tests.bench.scenarios.base import SLOTS, Scenario, Sizes, Subject


def case_name(clients: int) -> str:
    """How a case is called."""
    return f"{clients} client{'s' if clients > 1 else ''}"


class Closed(Scenario):
    """Many at once, one request each."""

    name = "closed"

    def slots(self, sizes: Sizes) -> int:
        """As many as clients."""
        return max(SLOTS, *sizes.clients)

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """A burst for each number of clients."""
        for clients in subject.sizes.clients:
            _, found = subject.measure(closed([[subject.ask()] for _ in range(clients)]))
            yield case_name(clients), {"clients": clients, **found}


class Single(Scenario):
    """One client, and nobody else."""

    name = "single"

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """Several requests, one after another."""
        outcome, found = subject.measure(closed([[subject.ask() for _ in range(subject.sizes.alone)]]))
        yield case_name(1), {"clients": 1, **found, "decode_tokens_per_s": decode_speed(outcome.samples)}

    def remark(self, figures: Figures) -> str:
        """The speed between first and last token, and beside it what the memory would allow."""
        speed, limit = figures["decode_tokens_per_s"], figures.get("bandwidth_tokens_per_s")
        beside = f", {speed / limit:.0%} of the {limit:.1f} that memory allows" if limit else ""
        return f"{speed:.1f} tok/s after the first token{beside}" if speed else ""
