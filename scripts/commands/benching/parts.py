"""Parts of the bench that measure this stack alone, each its own way: a name, a measurement, a line for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.commands.benching.hop import queue_hop
from scripts.commands.benching.streams import idle_streams


@dataclass(frozen=True, slots=True)
class Part:
    """One of them.

    Attributes:
        measure: given a small model's folder; returns figures.
        line: a format string for the figures.
        quick: whether it is short enough for `--quick`.
    """

    measure: Callable[[Path], dict[str, Any]]
    line: str
    quick: bool = False


PARTS: Final[dict[str, Part]] = {
    "hop": Part(
        queue_hop,
        "queue hop, accepted → in the engine, idle worker, {jobs} jobs: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms",
    ),
    "streams": Part(
        lambda _: idle_streams(500),
        "{streams} idle streams on one API process: {rss_mb:.0f} MB resident, {before_mb:.0f} MB before",
    ),
}
