"""Parts of the bench that measure this stack, each its own way: a name, a measurement, what people see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from tests.bench import api_cost, comparison, durability, path, recovery, speculation, switching
from tests.bench.hop import queue_hop
from tests.bench.interference import interference, lines
from tests.bench.streams import idle_streams


@dataclass(frozen=True, slots=True)
class Subject:
    """What a part measures.

    Attributes:
        model: folder of a model, a small one unless the command line names one.
        rounds: number of repetitions; their medians are shown.
        before: an earlier checkout of this repository that is measured in the same turns, where a part can.
    """

    model: Path
    rounds: int
    before: Path | None = None

    @property
    def earlier(self) -> Path:
        """The earlier checkout, for a part that needs it."""
        if self.before is None:
            raise ValueError("--before names no checkout")
        return self.before


@dataclass(frozen=True, slots=True)
class Part:
    """One of them.

    Attributes:
        measure: returns figures.
        show: the figures as a line or a table.
        quick: whether it is short enough for `--quick`.
        compares: whether it needs an earlier checkout.
    """

    measure: Callable[[Subject], dict[str, Any]]
    show: Callable[[dict[str, Any]], str | Table]
    quick: bool = False
    compares: bool = False

    def due(self, *, quick: bool, before: bool) -> bool:
        """Whether a run that names no part measures it."""
        return (self.quick or not quick) and (before or not self.compares)


def _line(form: str) -> Callable[[dict[str, Any]], str]:
    """A format string for the figures, as `show`."""
    return lambda figures: form.format(**figures)


PARTS: Final[dict[str, Part]] = {
    "hop": Part(
        lambda subject: queue_hop(subject.model),
        _line(
            "queue hop, accepted → in the engine, idle worker, {jobs} jobs: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms"
        ),
    ),
    "streams": Part(
        lambda _: idle_streams(500),
        _line("{streams} idle streams on one API process: {rss_mb:.0f} MB resident, {before_mb:.0f} MB before"),
    ),
    "interference": Part(lambda subject: interference(subject.model, subject.rounds), lines),
    "durability": Part(lambda subject: durability.durability(subject.rounds), durability.table),
    "pipeline": Part(lambda subject: path.pipeline(subject.rounds), path.pipeline_table),
    "submit": Part(lambda subject: path.submits(subject.rounds), path.submits_table),
    "switching": Part(lambda subject: switching.switching(subject.model, subject.rounds), switching.line, quick=True),
    "speculation": Part(lambda subject: speculation.speculation(subject.model, subject.rounds), speculation.table),
    "recovery": Part(lambda subject: recovery.recovery(subject.model, subject.rounds, subject.before), recovery.table),
    "comparison": Part(
        lambda subject: comparison.compare(subject.earlier, subject.rounds, subject.model.parent),
        comparison.table,
        compares=True,
    ),
    "api-cost": Part(lambda _: api_cost.api_cost(), api_cost.table, quick=True),
}
