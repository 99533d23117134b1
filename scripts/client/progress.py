"""What a run shows while it goes: a bar on a terminal, a line now and then elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scripts.client.results import Result

PLAIN_EVERY_S = 10.0


@dataclass
class Tally:
    """Numbers of this run; `done` and `failed` begin with what earlier runs of the same file left."""

    total: int
    done: int = 0
    failed: int = 0
    malformed: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, result: Result) -> None:
        """Count a result."""
        self.done += 1
        self.failed += not result.succeeded
        self.tokens += int((result.usage or {}).get("completion_tokens") or 0)

    @property
    def flawless(self) -> bool:
        """Whether every line of the file has succeeded."""
        return self.done == self.total and not self.failed and not self.malformed

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(time.monotonic() - self.began, 1e-3)

    def __str__(self) -> str:
        return f"{self.done} of {self.total} done, {self.failed} failed, {self.rate:.0f} tok/s"


class Display:
    """Shows a tally as it grows."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._notes: set[str] = set()
        self._shown_at = time.monotonic()
        self._earlier = tally.done
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tok/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]} failed"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=tally.total, completed=tally.done, rate=0.0, failed=tally.failed)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Show the tally as it is now."""
        tally = self._tally
        self._bar.update(self._task, completed=tally.done, rate=tally.rate, failed=tally.failed)
        if not self._console.is_terminal and time.monotonic() - self._shown_at >= PLAIN_EVERY_S:
            self._shown_at = time.monotonic()
            say(f"{tally}, ETA {self._eta()}")

    def note_once(self, text: str) -> None:
        """Say something the first time it is worth saying."""
        if text not in self._notes:
            self._notes.add(text)
            self._console.print(text, markup=False)

    def _eta(self) -> str:
        ahead, behind = self._tally.total - self._tally.done, self._tally.done - self._earlier
        seconds = (time.monotonic() - self._tally.began) * ahead / max(behind, 1)
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def say(text: str) -> None:
    """One line for the person who started the command."""
    print(text, file=sys.stderr, flush=True)
