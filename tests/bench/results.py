"""The results of a run: one record per case, contender and round, and the medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tests.bench.samples import Figures


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """What a figure belongs to.

    Attributes:
        who: the contender.
    """

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
    """Something that was not measured, and why.

    Attributes:
        fault: whether it should have been measured.
    """

    scenario: str
    model: str
    who: str
    why: str
    fault: bool = False


@dataclass(slots=True)
class Results:
    """All results of one run, in the order of measurement."""

    records: list[Record] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)

    def add_absence(self, absence: Absence) -> None:
        """Record an absence, once."""
        if absence not in self.absences:
            self.absences.append(absence)

    def medians(self) -> dict[Place, Figures]:
        """The median of each figure over rounds, in the order of measurement."""
        rounds: dict[Place, list[Figures]] = {}
        for record in self.records:
            rounds.setdefault(record.place, []).append(record.figures)
        return {place: _median(each) for place, each in rounds.items()}

    def to_json(self) -> dict[str, Any]:
        """The figures of every round, and the medians."""
        return {
            "records": [{**asdict(each.place), "round": each.round, "figures": each.figures} for each in self.records],
            "medians": [{**asdict(place), "figures": figures} for place, figures in self.medians().items()],
            "absences": [asdict(each) for each in self.absences],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read the output of `to_json`."""
        records = [
            Record(Place(each["scenario"], each["model"], each["case"], each["who"]), each["round"], each["figures"])
            for each in data["records"]
        ]
        return cls(records, [Absence(**each) for each in data["absences"]])


def _median(rounds: Iterable[Figures]) -> Figures:
    found = list(rounds)
    return {name: statistics.median(each[name] for each in found if name in each) for name in found[0]}
