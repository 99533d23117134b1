"""What a run has found: a record a case, contender and round, and the medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tests.bench.samples import Figures


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a figure belongs."""

    scenario: str
    model: str
    case: str
    who: str


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement."""

    place: Place
    round: int
    figures: Figures


@dataclass(frozen=True, slots=True)
class Absence:
    """Something that was not measured, and why."""

    scenario: str
    model: str
    who: str
    why: str
    fault: bool = False
    """Whether it ought to have been."""


@dataclass(slots=True)
class Results:
    """Everything of one run, in the order in which it was measured."""

    records: list[Record] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)

    def leave_out(self, absence: Absence) -> None:
        """Note an absence; one that was noted before is not noted again."""
        if absence not in self.absences:
            self.absences.append(absence)

    def medians(self) -> dict[Place, Figures]:
        """The median of each figure over rounds, the places in the order in which they first appeared."""
        rounds: dict[Place, list[Figures]] = {}
        for record in self.records:
            rounds.setdefault(record.place, []).append(record.figures)
        return {place: _median(each) for place, each in rounds.items()}

    def to_json(self) -> dict[str, Any]:
        """The raw rounds, and the medians again for who only wants these."""
        return {
            "records": [{**asdict(each.place), "round": each.round, "figures": each.figures} for each in self.records],
            "medians": [{**asdict(place), "figures": figures} for place, figures in self.medians().items()],
            "absences": [asdict(each) for each in self.absences],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        records = [
            Record(Place(each["scenario"], each["model"], each["case"], each["who"]), each["round"], each["figures"])
            for each in data["records"]
        ]
        return cls(records, [Absence(**each) for each in data["absences"]])


def _median(rounds: Iterable[Figures]) -> Figures:
    found = list(rounds)
    return {name: statistics.median(each[name] for each in found if name in each) for name in found[0]}
