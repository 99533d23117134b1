"""Progress of a long command on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

For programs, it can be written to stdout as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

EVERY_S = 10.0
"""Interval between plain lines."""
LABEL = TextColumn("{task.description}", markup=False)
PERCENT = (LABEL, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())


class Progress(Protocol):
    """Shows the progress of one task while its block runs."""

    def __init__(self, label: str, total: float) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def update(self, completed: float) -> None:
        """Report that `completed` of `total` is done."""
        ...


class JsonProgress:
    """Writes a line of JSON with `done` and `total` to stdout for each update."""

    def __init__(self, _label: str, total: float) -> None:
        self._total = total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, completed: float) -> None:
        """Write a line."""
        print(json.dumps({"done": completed, "total": self._total}), flush=True)


class ProgressBar:
    """Shows one task while the block runs.

    Args:
        total: value of `completed` at the end.
        columns: columns of the bar. Plain lines have the same ones without the bar.
        fields: values that columns show as `{task.fields[NAME]}`.
    """

    def __init__(
        self,
        label: str,
        total: float = 1.0,
        columns: Sequence[ProgressColumn] = PERCENT,
        *,
        completed: int = 0,
        **fields: Any,
    ) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._label = label
        self._texts = [column for column in columns if not isinstance(column, BarColumn)]
        self._progress = RichProgress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._id = self._progress.add_task(label, total=total, completed=completed, **fields)
        self._printed_at = time.monotonic()

    def __enter__(self) -> Self:
        if self._progress.disable and self._label:
            self.print(self._label)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, completed: float, **fields: Any) -> None:
        """Update the bar, or the next plain line."""
        self._progress.update(self._id, completed=completed, **fields)
        if self._progress.disable and time.monotonic() - self._printed_at >= EVERY_S:
            self._printed_at = time.monotonic()
            (task,) = self._progress.tasks
            self.print(" ".join(str(column(task)) for column in self._texts))

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False)
