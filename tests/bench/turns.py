"""Whose turn it is: contenders alternate (A B C, A B C, …), so that a machine that drifts drifts for all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from tests.bench.contenders import CONTENDERS, Contender
from tests.bench.plans import closed
from tests.bench.processes import NotUp
from tests.bench.results import Absence, Place, Record, Results
from tests.bench.scenarios.base import LeftOut, Scenario, Sizes, Subject
from tests.bench.scenarios.registry import SCENARIOS

_WARM_CLIENTS, _WARM_TOKENS = 2, 8
_NUMBERS_A_ROUND = 1_000_000


@dataclass(frozen=True, slots=True)
class Question:
    """What a run is about.

    Attributes:
        models: folders, each with the sizes that fit it.
        vision: the folder of the images' scenario.
        at_once: all scenarios on one start of a contender: fewer starts, coarser turns.
    """

    models: dict[Path, Sizes]
    scenarios: Sequence[str]
    contenders: Sequence[str]
    rounds: int
    vision: Path | None = None
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One start of one contender, and what it is asked."""

    model: Path
    sizes: Sizes
    scenarios: tuple[Scenario, ...]
    contender: Contender
    round: int

    def __str__(self) -> str:
        names = ", ".join(each.name for each in self.scenarios)
        return f"{self.contender.name}: {names}, {self.model.name}, round {self.round + 1}"


def turns(question: Question, absences: Callable[[Absence], None]) -> Iterator[Turn]:
    """All turns in their order; who cannot take part is told to `absences`."""
    for model, sizes, scenarios in _stages(question, absences):
        for number in range(question.rounds):
            for name in question.contenders:
                contender = CONTENDERS[name]
                due = tuple(
                    each
                    for each in scenarios
                    if (each.rounds is None or number < each.rounds) and _takes_part(contender, each, model, absences)
                )
                if due:
                    yield Turn(model, sizes, due, contender, number)


def _stages(
    question: Question, absences: Callable[[Absence], None]
) -> Iterator[tuple[Path, Sizes, tuple[Scenario, ...]]]:
    """Models with scenarios that share a start."""
    asked = [SCENARIOS[name] for name in question.scenarios]
    textual = [each for each in asked if not each.sees]
    for model, sizes in question.models.items():
        for group in [tuple(textual)] if question.at_once else [(each,) for each in textual]:
            yield model, sizes, group
    for each in asked:
        if each.sees and question.vision:
            yield question.vision, next(iter(question.models.values())), (each,)
        elif each.sees:
            absences(
                Absence(
                    each.name,
                    "",
                    "",
                    "--vision-model names no folder; scripts/make_tiny_model --shape tiny-vision makes one",
                )
            )


def _takes_part(contender: Contender, scenario: Scenario, model: Path, absences: Callable[[Absence], None]) -> bool:
    if contender.scenarios is not None and scenario.name not in contender.scenarios:
        return False
    why = contender.missing() or scenario.excludes(contender.name)
    if why:
        absences(Absence(scenario.name, model.name, contender.name, why))
    return not why


def take(turn: Turn, results: Results) -> None:
    """Start the contender, ask, note what it gave; what fails is noted too, and the run goes on."""
    slots = max(each.slots(turn.sizes) for each in turn.scenarios)
    at = Absence("", turn.model.name, turn.contender.name, "", fault=True)
    try:
        with turn.contender.start(turn.model, slots) as running:
            # The same numbers in the same order for every contender of a round.
            numbers = count(turn.round * _NUMBERS_A_ROUND)
            subject = Subject(turn.contender, running, turn.model, turn.sizes, numbers)
            if not turn.scenarios[0].sees:
                running.run(closed([[subject.ask(_WARM_TOKENS)] for _ in range(_WARM_CLIENTS)]))
            for scenario in turn.scenarios:
                _ask(scenario, subject, turn.round, results)
    except NotUp as error:
        print(f"{turn}: {error}\n{error.log}", file=sys.stderr)
        results.leave_out(replace(at, scenario=turn.scenarios[0].name, why=str(error)))


def _ask(scenario: Scenario, subject: Subject, number: int, results: Results) -> None:
    model, who = subject.model.name, subject.contender.name
    try:
        for case, figures in scenario.run(subject):
            results.records.append(Record(Place(scenario.name, model, case, who), number, figures))
    except LeftOut as error:
        results.leave_out(Absence(scenario.name, model, who, str(error)))
