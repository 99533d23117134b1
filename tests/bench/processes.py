"""Processes that are measured: started, waited for, ended."""

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
from typing import Any

from shared.settings import ROOT

START_WITHIN_S = 600


def asked(module: str, question: dict[str, Any], timeout_s: float) -> Any:
    """What a module of this package answers to a question, both as JSON, in a process of its own.

    Raises:
        RuntimeError: it failed; the text is what it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{module}"],
        input=json.dumps(question),
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


class NotUp(Exception):
    """A process did not come up, or is gone; the text is a line that says why, `log` what it wrote last."""

    def __init__(self, why: str, log: str = "") -> None:
        super().__init__(why)
        self.log = log
        if log:
            self.add_note(log)  # a traceback shows it


@contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str] | None = None, folder: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a group of its own, ended with SIGTERM, and SIGKILL after a while."""
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=folder, env={**os.environ, **(env or {})}, start_new_session=True
        )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `url` answers 200.

    Raises:
        NotUp: the process ended, or it took too long.
    """
    wait_until(lambda: answers(url), child, log)


def wait_until(up: Callable[[], bool], child: subprocess.Popen[bytes], log: Path) -> None:
    """The same with a condition of one's own."""
    end = time.monotonic() + START_WITHIN_S
    while time.monotonic() < end and child.poll() is None:
        if up():
            return
        time.sleep(0.1)
    raise NotUp("it did not come up", log.read_text(errors="replace")[-2000:])


def answers(url: str) -> bool:
    """Whether `url` answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
