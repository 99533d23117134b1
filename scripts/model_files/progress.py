"""One progress bar on a terminal; anywhere else a line, and more of them while it takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_console = Console(stderr=True, highlight=False)
EVERY_S = 10.0
"""Between two lines."""


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float], None]]:
    """Show `label` while the block runs; call what it yields with the part done so far, 0 to 1."""
    if not _console.is_terminal:
        yield _lines(label)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda part: progress.update(task, completed=part)


def _lines(label: str) -> Callable[[float], None]:
    """Say what is done, and from time to time how far it is."""
    _console.print(label, soft_wrap=True, markup=False)
    said_at = time.monotonic()

    def show(part: float) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= EVERY_S:
            said_at = time.monotonic()
            _console.print(f"{label}: {part:.0%}", soft_wrap=True, markup=False)

    return show
