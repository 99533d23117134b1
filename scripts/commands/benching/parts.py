"""Parts of the bench that measure this stack alone, each its own way: a name, a measurement, what people see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from scripts.commands.benching import batches, durability, path, speculation, switching
from scripts.commands.benching.hop import queue_hop
from scripts.commands.benching.interference import interference, lines
from scripts.commands.benching.streams import idle_streams


@dataclass(frozen=True, slots=True)
class Part:
    """One of them.

    Attributes:
        measure: given a model's folder (a small one, unless one is asked for) and how often to take turns; returns
            figures.
        show: the figures as a line or a table.
        quick: whether it is short enough for `--quick`.
    """

    measure: Callable[[Path, int], dict[str, Any]]
    show: Callable[[dict[str, Any]], str | Table]
    quick: bool = False


def _line(form: str) -> Callable[[dict[str, Any]], str]:
    """A format string for the figures, as `show`."""
    return lambda figures: form.format(**figures)


PARTS: Final[dict[str, Part]] = {
    "hop": Part(
        lambda model, _: queue_hop(model),
        _line(
            "queue hop, accepted → in the engine, idle worker, {jobs} jobs: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms"
        ),
    ),
    "streams": Part(
        lambda *_: idle_streams(500),
        _line("{streams} idle streams on one API process: {rss_mb:.0f} MB resident, {before_mb:.0f} MB before"),
    ),
    "interference": Part(interference, lines),
    "durability": Part(lambda _, rounds: durability.durability(rounds), durability.table),
    "pipeline": Part(lambda _, rounds: path.pipeline(rounds), path.pipeline_table),
    "batch": Part(batches.batches, batches.table),
    "submit": Part(lambda _, rounds: path.submits(rounds), path.submits_table),
    "switching": Part(switching.switching, switching.line, quick=True),
    "speculation": Part(speculation.speculation, speculation.table),
}
