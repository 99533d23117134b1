"""The table of results, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from rich.table import Table

from tests.bench.contenders import PEER
from tests.bench.results import Absence, Place, Results
from tests.bench.samples import Figures
from tests.bench.scenarios.registry import SCENARIOS

_COLUMNS = (
    ("TTFT p50 s", "ttft_p50_s", ".3f"),
    ("TTFT p99 s", "ttft_p99_s", ".3f"),
    ("ITL p50 s", "gap_p50_s", ".3f"),
    ("ITL p99 s", "gap_p99_s", ".3f"),
    ("CPU s/1k tok", "cpu_s_per_1k", ".2f"),
    ("peak MB", "peak_mb", ".0f"),
)
_LEFT_ALIGNED = ("case", "contender", "remarks")
HEADINGS = ("case", "contender", "tok/s", f"÷ {PEER}", *(heading for heading, _, _ in _COLUMNS), "remarks")


def rows(results: Results) -> Iterator[tuple[str, ...]]:
    """One row per case and contender, grouped by scenario and model."""
    medians = results.medians()
    order = {name: i for i, name in enumerate(SCENARIOS)}
    by_case = sorted(medians, key=lambda place: (order[place.scenario], place.model))  # stable: cases keep their order
    for (scenario, model), places in groupby(by_case, key=lambda place: (place.scenario, place.model)):
        for case, found in _cases(list(places)):
            for i, place in enumerate(found):
                title = "" if i else f"{scenario}: {model}, {case}"
                yield (title, place.who, *_cells(place, medians), SCENARIOS[scenario].remark(medians[place]))


def _cases(places: list[Place]) -> Iterator[tuple[str, list[Place]]]:
    for case in dict.fromkeys(place.case for place in places):
        yield case, [place for place in places if place.case == case]


def _cells(place: Place, medians: Mapping[Place, Figures]) -> Iterator[str]:
    figures = medians[place]
    peer = medians.get(Place(place.scenario, place.model, place.case, PEER), {}).get("tokens_per_s")
    yield f"{figures['tokens_per_s']:,.1f}"
    yield f"{figures['tokens_per_s'] / peer:.2f}" if peer else ""
    for _, name, form in _COLUMNS:
        yield format(figures[name], form) + _warning(name, figures)


def _warning(name: str, figures: Figures) -> str:
    """Latencies cover complete answers only, so the number of failures stands beside them."""
    return f" ({figures['failed']:.0f} failed)" if name == "ttft_p50_s" and figures["failed"] else ""


def terminal(results: Results) -> Table:
    """The table for the terminal."""
    table = Table(title="medians over rounds; greedy, streamed; TTFT and ITL measured by the client")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in _LEFT_ALIGNED else "right")
    for row in rows(results):
        if row[0] and table.rows:
            table.add_section()
        table.add_row(*row)
    return table


def markdown(results: Results) -> str:
    """The table for a page."""
    marks = ("---" if heading in _LEFT_ALIGNED else "--:" for heading in HEADINGS)
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEADINGS, tuple(marks), *rows(results)))


def absences(results: Results) -> list[str]:
    """One line per reason why something was not measured."""
    by_reason: dict[str, list[Absence]] = {}
    for each in results.absences:
        by_reason.setdefault(each.why, []).append(each)
    return [
        f"{'FAILED' if each[0].fault else 'not measured'}: {_names(each)}: {why}" for why, each in by_reason.items()
    ]


def _names(absences: list[Absence]) -> str:
    parts = (
        " ".join(dict.fromkeys(part for part in column if part))
        for column in zip(*((each.who, each.scenario, each.model) for each in absences), strict=True)
    )
    return ", ".join(part for part in parts if part)
