"""What a scenario is: a question put to each contender in the same words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar, Final

from tests.bench.contenders import Contender, Running
from tests.bench.plans import Ask, Plan
from tests.bench.prompts import question
from tests.bench.resources import Meter
from tests.bench.samples import Bound, Figures, Outcome, figures

SLOTS: Final = 32
"""What every server has, unless told otherwise."""
BOUND: Final = Bound(ttft_s=2.0, gap_s=0.25)


class LeftOut(Exception):
    """A scenario says nothing of a contender, or of this machine; the text is the line that says why."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked.

    Attributes:
        clients: at once, in closed loops.
        tokens: of each answer.
        alone: requests of the one client that is alone, one after another.
        open_s: how long requests come in an open loop.
        loads: the rates of open loops, as parts of the capacity.
        slots_busy: clients that the capacity is measured with; each sends several requests.
        bound: what makes an answer in an open loop a good one.
        prefix_tokens: of the prompt that requests share.
        running: rows that go on while long prompts come.
        long_tokens: of each long prompt.
        long_prompts: how many of them come.
    """

    clients: tuple[int, ...] = (8, 32, 64)
    tokens: int = 48
    alone: int = 5
    open_s: float = 60.0
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    slots_busy: int = 32
    bound: Bound = BOUND
    prefix_tokens: int = 2000
    running: int = 8
    long_tokens: int = 4000
    long_prompts: int = 2


QUICK = Sizes(
    clients=(4,), tokens=16, alone=2, open_s=4.0, slots_busy=4, prefix_tokens=300, running=2, long_tokens=600,
    long_prompts=1,
)  # fmt: skip


@dataclass(slots=True)
class Subject:
    """A contender at its turn.

    Attributes:
        numbers: of questions; every contender is asked the same ones, and none of them twice.
    """

    contender: Contender
    running: Running
    model: Path
    sizes: Sizes
    numbers: Iterator[int] = field(default_factory=count)

    def ask(self, tokens: int | None = None, *, kind: str = "", at_s: float = 0.0, batch: bool = False) -> Ask:
        """A short question that was not asked before."""
        return Ask(question(next(self.numbers)), tokens or self.sizes.tokens, at_s, kind, batch)

    def measure(self, plan: Plan) -> tuple[Outcome, Figures]:
        """Do a plan; its figures over all requests, with what they took of the machine."""
        with Meter(self.running.pid) as meter:
            outcome = self.running.run(plan)
        found = figures(outcome.samples, outcome.wall_s)
        text = sum(len(sample.chunks) if sample.ended_s is None else sample.tokens for sample in outcome.samples)
        return outcome, {**found, "cpu_s_per_1k": meter.cpu_s * 1000 / max(text, 1), "peak_mb": meter.peak_mb}


class Scenario(ABC):
    """A question.

    Attributes:
        rounds: how often at most; None: as often as the run has rounds.
        sees: whether it needs a model that takes images.
    """

    name: ClassVar[str]
    rounds: ClassVar[int | None] = None
    sees: ClassVar[bool] = False

    def slots(self, sizes: Sizes) -> int:
        """Rows that a contender which can be told shall have."""
        del sizes
        return SLOTS

    def excludes(self, contender: str) -> str:
        """Why a contender need not even be started; empty when it takes part."""
        del contender
        return ""

    @abstractmethod
    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """Ask; each case's name with its figures.

        Raises:
            LeftOut: nothing, or no more, can be asked.
        """

    def remark(self, figures: Figures) -> str:
        """What is particular to this scenario, for the table's last column."""
        del figures
        return ""
