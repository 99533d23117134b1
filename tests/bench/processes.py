"""Starting the measured processes, waiting for them, and stopping them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from shared.settings import ROOT

T = TypeVar("T")

_START_WITHIN_S: Final = 600.0
_STOP_WITHIN_S: Final = 60.0


class NotUp(Exception):
    """A process did not start, or has ended; the text is one line with the reason, `log` is the end of its output."""

    def __init__(self, why: str, log: str = "") -> None:
        super().__init__(why)
        self.log = log
        if log:
            self.add_note(log)  # shown in a traceback


def run_module(module: str, parameters: dict[str, Any], timeout_s: float) -> Any:
    """Run a module of this package in its own process: JSON on standard input, JSON on standard output.

    Raises:
        RuntimeError: it failed; the text is its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{module}"],
        input=json.dumps(parameters),
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


@contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str] | None = None, folder: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process in its own process group; stopped with SIGTERM, and with SIGKILL if it does not end in time."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=folder, env={**os.environ, **(env or {})}, start_new_session=True
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def poll(probe: Callable[[], T], what: str, within_s: float, every_s: float = 0.1) -> T:
    """Call `probe` until it returns a true value, and return that.

    Args:
        what: the condition, for the error.

    Raises:
        NotUp: it did not within the time.
    """
    end = time.monotonic() + within_s
    while not (value := probe()):
        if time.monotonic() > end:
            raise NotUp(f"not within {within_s:.0f} s: {what}")
        time.sleep(every_s)
    return value


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `url` answers 200.

    Raises:
        NotUp: the process ended, or did not start in time.
    """
    wait_until(lambda: answers(url), child, log)


def wait_until(started: Callable[[], bool], child: subprocess.Popen[bytes], log: Path) -> None:
    """The same with another condition."""
    try:
        poll(lambda: child.poll() is not None or started(), "the process has started", _START_WITHIN_S)
    except NotUp as error:
        raise NotUp(str(error), _end_of(log)) from None
    if child.poll() is not None:
        raise NotUp(f"the process ended with status {child.returncode}", _end_of(log))


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def answers(url: str) -> bool:
    """Whether `url` answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
