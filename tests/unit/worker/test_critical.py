"""A worker process ends with its status, even if something fails or hangs on the way."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from shared.settings import ROOT
from worker import app
from worker.process.exits import EXIT_BROKEN

FULL = """
import sys
from worker.process.critical import exit_now
sys.stdout = open("/dev/full", "w")
print("this cannot be written")
exit_now(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_log_that_cannot_be_written_does_not_change_the_status() -> None:
    assert subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, check=False, timeout=60).returncode == 7


HANGING_STEPS = """
import logging, threading
from worker.process import critical
critical.FINAL_STEPS_S = 0.2
lock = threading.Lock()
lock.acquire()
class Stuck(logging.Handler):
    def emit(self, record):
        lock.acquire()  # as if nobody read the process's output
logging.getLogger().addHandler(Stuck())
critical.end_process("it hangs", lock.acquire)
"""

FAILING_STEP = """
from worker.process.critical import exit_after
def fails():
    raise OSError("Redis is away")
exit_after(7, fails, lambda: print("done", flush=True))
"""


def test_a_final_step_that_hangs_does_not_keep_the_process_alive() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGING_STEPS], cwd=ROOT, check=False, timeout=60)
    assert ended.returncode == EXIT_BROKEN


def test_a_final_step_that_fails_does_not_stop_the_next() -> None:
    ended = subprocess.run([sys.executable, "-c", FAILING_STEP], cwd=ROOT, check=False, timeout=60, capture_output=True)
    assert (ended.returncode, ended.stdout) == (7, b"done\n")


@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), SystemExit(3), KeyboardInterrupt()])
def test_any_exception_becomes_an_exit_status_and_a_log_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def broken(_: object) -> int:
        raise error

    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setattr(app, "configure", lambda *_: None)
    monkeypatch.setattr(app.Service, "run", broken)
    assert app.main() == EXIT_BROKEN
    assert [record.levelno for record in caplog.records if record.name == "worker.app"] == [logging.CRITICAL]
