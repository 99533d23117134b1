"""What a scenario is: the same requests for every contender, and the figures that are computed from the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar, Final

from tests.bench.contenders import Contender, Running
from tests.bench.plans import ChatRequest, Plan
from tests.bench.prompts import question
from tests.bench.resources import Meter
from tests.bench.samples import Figures, LatencyTarget, Outcome, figures

SLOTS: Final = 32
"""Default concurrency limit of every contender."""
TARGET: Final = LatencyTarget(ttft_s=2.0, gap_s=0.25)


class NotMeasured(Exception):
    """A scenario has no result for a contender; the text is one line with the reason."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is requested.

    Attributes:
        clients: numbers of concurrent clients in closed loops.
        tokens: of each answer.
        alone: requests of the single client, one after another.
        open_s: how long requests arrive in an open loop.
        loads: rates of the open loops, as fractions of the capacity.
        slots_busy: clients that send requests while the capacity is measured.
        target: the latency of answers that count for goodput.
        prefix_tokens: of the prompt that requests share.
        running: rows that decode while long prompts arrive.
        long_tokens: of each long prompt.
        long_prompts: how many of them arrive.
    """

    clients: tuple[int, ...] = (8, 32, 64)
    tokens: int = 48
    alone: int = 5
    open_s: float = 60.0
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    slots_busy: int = 32
    target: LatencyTarget = TARGET
    prefix_tokens: int = 2000
    running: int = 8
    long_tokens: int = 4000
    long_prompts: int = 2


QUICK: Final = Sizes(
    clients=(4,), tokens=16, alone=2, open_s=4.0, slots_busy=4, prefix_tokens=300, running=2, long_tokens=600,
    long_prompts=1,
)  # fmt: skip


@dataclass(slots=True)
class Subject:
    """A contender that has been started for its turn.

    Attributes:
        numbers: of the questions; every contender gets the same ones, each only once.
    """

    contender: Contender
    running: Running
    model: Path
    sizes: Sizes
    numbers: Iterator[int] = field(default_factory=count)

    def request(
        self, tokens: int | None = None, *, kind: str = "", at_s: float = 0.0, batch: bool = False
    ) -> ChatRequest:
        """A short question that has not been sent before."""
        return ChatRequest(question(next(self.numbers)), tokens or self.sizes.tokens, at_s, kind, batch)

    def measure(self, plan: Plan) -> tuple[Outcome, Figures]:
        """Run a plan; figures over all requests, with the CPU time and memory that they took."""
        with Meter(self.running.pid) as meter:
            outcome = self.running.run(plan)
        found = figures(outcome.samples, outcome.wall_s)
        tokens = sum(len(sample.chunks) if sample.ended_s is None else sample.tokens for sample in outcome.samples)
        return outcome, {**found, "cpu_s_per_1k": meter.cpu_s * 1000 / max(tokens, 1), "peak_mb": meter.peak_mb}


class Scenario(ABC):
    """A kind of load.

    Attributes:
        rounds: maximum number of rounds; None: all rounds of the run.
        needs_images: whether it needs a model that takes images.
    """

    name: ClassVar[str]
    rounds: ClassVar[int | None] = None
    needs_images: ClassVar[bool] = False

    def slots(self, sizes: Sizes) -> int:
        """The concurrency limit, for contenders that have that option."""
        del sizes
        return SLOTS

    def excluded(self, contender: str) -> str:
        """Why a contender cannot take part; empty if it can."""
        del contender
        return ""

    @abstractmethod
    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """Send the requests; the name of each case with its figures.

        Raises:
            NotMeasured: no case, or no further case, can be measured.
        """

    def remark(self, figures: Figures) -> str:
        """Figures that only this scenario has, for the last column of the table."""
        del figures
        return ""
