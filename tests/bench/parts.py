"""Parts of the bench that measure this stack only: the name of each, its measurement, and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from tests.bench import (
    adapters,
    api_cost,
    bad_draft,
    comparison,
    constrained,
    durability,
    interference,
    long_contexts,
    path,
    recovery,
    speculation,
    streams,
    switching,
)

_IDLE_STREAMS: Final = 500


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a part.

    Attributes:
        model: folder of a model, the tiny one unless the command line names another.
        rounds: number of repetitions; their medians are shown.
        before: an earlier checkout of this repository, which some parts measure in the same turns.
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
    """One part.

    Attributes:
        measure: returns figures.
        show: formats the figures as a line or a table.
        quick: whether `--quick` includes it.
        compares: whether it needs an earlier checkout.
    """

    measure: Callable[[Options], dict[str, Any]]
    show: Callable[[dict[str, Any]], str | Table]
    quick: bool = False
    compares: bool = False

    def due(self, *, quick: bool, before: bool) -> bool:
        """Whether a run that names no part includes it."""
        return (self.quick or not quick) and (before or not self.compares)


def _line(form: str) -> Callable[[dict[str, Any]], str]:
    """A `show` that fills in a format string."""
    return lambda figures: form.format(**figures)


PARTS: Final[dict[str, Part]] = {
    "hop": Part(
        lambda options: path.queue_hop(options.model),
        _line("queue latency, accepted to engine, idle worker, {jobs} jobs: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms"),
    ),
    "streams": Part(
        lambda _: streams.idle_streams(_IDLE_STREAMS),
        _line("{streams} idle streams on one API process: {rss_mb:.0f} MB resident, {before_mb:.0f} MB before"),
    ),
    "interference": Part(lambda options: interference.interference(options.model, options.rounds), interference.lines),
    "durability": Part(lambda options: durability.durability(options.rounds), durability.table),
    "pipeline": Part(lambda options: path.pipeline(options.rounds), path.pipeline_table),
    "submit": Part(lambda options: path.submits(options.rounds), path.submits_table),
    "switching": Part(lambda options: switching.switching(options.model, options.rounds), switching.line, quick=True),
    "speculation": Part(lambda options: speculation.speculation(options.model, options.rounds), speculation.table),
    "bad-draft": Part(lambda options: bad_draft.bad_draft(options.model, options.rounds), bad_draft.table),
    "adapters": Part(lambda options: adapters.adapters(options.model, options.rounds), adapters.table),
    "constrained": Part(lambda options: constrained.constrained(options.model, options.rounds), constrained.table),
    "long-contexts": Part(
        lambda options: long_contexts.long_contexts(options.model, options.rounds), long_contexts.table
    ),
    "recovery": Part(lambda options: recovery.recovery(options.model, options.rounds, options.before), recovery.table),
    "comparison": Part(
        lambda options: comparison.compare(options.earlier, options.rounds, options.model.parent),
        comparison.table,
        compares=True,
    ),
    "api-cost": Part(lambda _: api_cost.api_cost(), api_cost.table, quick=True),
}
