"""The order of measurement: contenders alternate (A B C, A B C, …), so that a drifting machine affects all equally."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Final

from tests.bench.contenders import CONTENDERS, Contender
from tests.bench.plans import closed
from tests.bench.processes import NotUp
from tests.bench.resources import settle
from tests.bench.results import Absence, Place, Record, Results
from tests.bench.scenarios.base import NotMeasured, Scenario, Sizes, Subject
from tests.bench.scenarios.registry import SCENARIOS

_WARM_CLIENTS, _WARM_TOKENS = 2, 8
_QUESTIONS_PER_ROUND: Final = 1_000_000
_NO_VISION_MODEL: Final = (
    "--vision-model is not a folder; scripts/make_tiny_model --shape tiny-vision makes a model with images"
)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a run measures.

    Attributes:
        models: folders, each with the sizes that fit it.
        vision: the folders of models for images.
        one_start: whether all scenarios of a contender share one start: fewer starts, coarser turns.
    """

    models: dict[Path, Sizes]
    scenarios: Sequence[str]
    contenders: Sequence[str]
    rounds: int
    vision: Sequence[Path] = ()
    one_start: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One start of one contender, and the scenarios that it runs."""

    model: Path
    sizes: Sizes
    scenarios: tuple[Scenario, ...]
    contender: Contender
    round: int

    def __str__(self) -> str:
        names = ", ".join(each.name for each in self.scenarios)
        return f"{self.contender.name}: {names}, {self.model.name}, round {self.round + 1}"


def turns(selection: Selection, absent: Callable[[Absence], None]) -> Iterator[Turn]:
    """All turns in order; calls `absent` for each contender that cannot take part."""
    for model, sizes, scenarios in _stages(selection, absent):
        for number in range(selection.rounds):
            for name in selection.contenders:
                contender = CONTENDERS[name]
                due = tuple(
                    each
                    for each in scenarios
                    if (each.rounds is None or number < each.rounds) and _takes_part(contender, each, model, absent)
                )
                if due:
                    yield Turn(model, sizes, due, contender, number)


def _stages(
    selection: Selection, absent: Callable[[Absence], None]
) -> Iterator[tuple[Path, Sizes, tuple[Scenario, ...]]]:
    """Models with the scenarios that share a start."""
    chosen = [SCENARIOS[name] for name in selection.scenarios]
    text = [each for each in chosen if not each.needs_images]
    for model, sizes in selection.models.items():
        for group in [tuple(text)] if selection.one_start else [(each,) for each in text]:
            yield model, sizes, group
    for each in chosen:
        for model in selection.vision if each.needs_images else ():
            yield model, next(iter(selection.models.values())), (each,)
        if each.needs_images and not selection.vision:
            absent(Absence(each.name, "", "", _NO_VISION_MODEL))


def _takes_part(contender: Contender, scenario: Scenario, model: Path, absent: Callable[[Absence], None]) -> bool:
    if contender.scenarios is not None and scenario.name not in contender.scenarios:
        return False
    why = contender.missing() or scenario.excluded(contender.name)
    if why:
        absent(Absence(scenario.name, model.name, contender.name, why))
    return not why


def measure(turn: Turn, results: Results) -> None:
    """Start the contender, run the scenarios, record the figures. A failure is recorded too, and the run continues."""
    slots = max(each.slots(turn.sizes) for each in turn.scenarios)
    absence = Absence("", turn.model.name, turn.contender.name, "", fault=True)
    try:
        with turn.contender.start(turn.model, slots) as running:
            # The same questions in the same order for every contender of a round.
            numbers = count(turn.round * _QUESTIONS_PER_ROUND)
            subject = Subject(turn.contender, running, turn.model, turn.sizes, numbers)
            _warm(turn, subject)
            for scenario in turn.scenarios:
                _measure(scenario, subject, turn.round, results)
    except NotUp as error:
        print(f"{turn}: {error}\n{error.log}", file=sys.stderr)
        results.add_absence(replace(absence, scenario=turn.scenarios[0].name, why=str(error)))


def _warm(turn: Turn, subject: Subject) -> None:
    """Wait until the contender is idle, and send a few requests. They may start more programs, so wait again."""
    settle(subject.running.pid)
    if not turn.scenarios[0].needs_images:
        subject.running.run(closed([[subject.request(_WARM_TOKENS)] for _ in range(_WARM_CLIENTS)]))
        settle(subject.running.pid)


def _measure(scenario: Scenario, subject: Subject, number: int, results: Results) -> None:
    model, who = subject.model.name, subject.contender.name
    try:
        for case, figures in scenario.run(subject):
            results.records.append(Record(Place(scenario.name, model, case, who), number, figures))
    except NotMeasured as error:
        results.add_absence(Absence(scenario.name, model, who, str(error)))
