"""The frame of a command that tests a stack: log, folder, report, clean-up and exit status."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.logging import RichHandler

from tests.chaos import workspaces
from tests.chaos.stack import ChaosStack

INTERRUPTED = 130
_QUIET = ("httpx2", "httpcore2")
"""Libraries that would log every request."""


class Report(Protocol):
    """The result of a run."""

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        ...

    def show(self, console: Console) -> None:
        """Print the result."""
        ...


R = TypeVar("R", bound=Report)


def run_in_workspace(
    build: Callable[[Path], ChaosStack],
    run: Callable[[ChaosStack], R],
    save: Callable[[R], None],
    *,
    keep: bool,
) -> int:
    """Build a stack in a new folder, run it, show and save the report; return the exit status.

    Args:
        build: prepares the stack in a folder.
        save: writes the files that the user asked for.
        keep: keep the folder with the logs, as after a failure.
    """
    errors = _configure_log()
    workspaces.clean_up()
    home = workspaces.create(os.getpid())
    passed, stack = False, None
    try:
        stack = build(home)
        report = run(stack)
        report.show(Console(width=None if sys.stdout.isatty() else 140))
        save(report)
        passed = report.passed
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if stack is not None:
            stack.close()
        if passed and not keep:
            shutil.rmtree(home)
        else:
            errors.print(f"logs: {home}")
    return 0 if passed else 1


def _configure_log() -> Console:
    errors = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)]
    )
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return errors
