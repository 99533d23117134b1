"""Progress of a batch on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Final

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scripts.client.results import Result
from scripts.lib.progress import ProgressBar

_COLUMNS: Final = (
    BarColumn(bar_width=None),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]:.0f} tok/s"),
    TimeElapsedColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[failed]} failed"),
)


@dataclass
class Tally:
    """Counters of this run. `done` and `failed` include the results of earlier runs."""

    total: int
    done: int = 0
    failed: int = 0
    malformed: int = 0
    tokens: int = 0
    started_at: float = field(default_factory=time.monotonic)

    def add(self, result: Result) -> None:
        """Count a result."""
        self.done += 1
        self.failed += not result.succeeded
        self.tokens += int((result.usage or {}).get("completion_tokens") or 0)

    @property
    def all_succeeded(self) -> bool:
        """Whether every line of the prompts file has succeeded."""
        return self.done == self.total and not self.failed and not self.malformed

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / max(time.monotonic() - self.started_at, 1e-3)

    def __str__(self) -> str:
        return f"{self.done} of {self.total} done, {self.failed} failed, {self.rate:.0f} tok/s"


class Display(ProgressBar):
    """Shows a tally."""

    def __init__(self, tally: Tally) -> None:
        super().__init__("", tally.total, _COLUMNS, completed=tally.done, rate=0.0, failed=tally.failed)
        self._tally = tally
        self._notes: set[str] = set()

    def refresh(self) -> None:
        """Show the current values."""
        self.update(self._tally.done, rate=self._tally.rate, failed=self._tally.failed)

    def note_once(self, text: str) -> None:
        """Print a note, unless it was printed before."""
        if text not in self._notes:
            self._notes.add(text)
            self.print(text)


def print_line(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
