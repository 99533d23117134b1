"""The launcher with a child that is a few lines of Python: signals, exit statuses, and whose death ends whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shared.settings import ROOT

LAUNCHER = """
import sys
from worker.process import launcher
launcher.Launcher.report = lambda self, ended: print("died:", ended.describe(), flush=True)
exec(sys.argv[2])
original = launcher.Launcher.__init__
launcher.Launcher.__init__ = lambda self: original(self, (sys.executable, "-c", sys.argv[1]))
launcher.main()
"""
"""The launcher as it is run, with another command and a report that only prints."""

DRAINS = """
import os, signal, time
from worker.process.parent import Launch, end_with_launcher
seen = []
def on_signal(number, frame):
    seen.append(number)
    print("signal", signal.Signals(number).name, len(seen), flush=True)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)
end_with_launcher(Launch.current())
print("ready", os.getpid(), flush=True)
while len(seen) < 2:
    time.sleep(0.01)
    if seen and os.environ.get("QUICK"):
        break
print("drained", flush=True)
os._exit(0)
"""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a launcher with this child; both are gone after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(child: str, prelude: str = "", **variables: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "DATA_DIR": str(tmp_path), "ENV_FILE": os.devnull, **variables}
        with (tmp_path / "out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, child, prelude],
                cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def said(tmp_path: Path) -> Callable[[], str]:
    return (tmp_path / "out").read_text


def child_of(launcher: subprocess.Popen[bytes]) -> psutil.Process:
    [child] = psutil.Process(launcher.pid).children()
    return child


@pytest.mark.parametrize("status", [0, 1, 70, 78])
def test_it_ends_with_its_childs_status(start: Start, said: Callable[[], str], status: int) -> None:
    assert start(f"raise SystemExit({status})").wait(30) == status
    assert ("died:" in said()) == (status not in (0, 78))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_it_ends_by_its_childs_signal(start: Start, said: Callable[[], str], number: signal.Signals) -> None:
    assert start(f"import os; os.kill(os.getpid(), {int(number)})").wait(30) == -number
    assert f"died: signal {int(number)} ({number.name})" in said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_child_one_by_one(
    start: Start, said: Callable[[], str], eventually: Callable[..., None], number: signal.Signals
) -> None:
    launcher = start(DRAINS)
    eventually(lambda: "ready" in said())
    for count in (1, 2):
        launcher.send_signal(number)
        eventually(lambda: f"signal {number.name} {count}" in said())  # noqa: B023 - called at once
    assert launcher.wait(30) == 0
    assert "drained" in said()


def test_a_child_whose_launcher_is_killed_drains_and_ends(
    start: Start, said: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS, QUICK="1")
    eventually(lambda: "ready" in said())
    child = child_of(launcher)
    launcher.kill()
    assert launcher.wait(30) == -signal.SIGKILL
    psutil.wait_procs([child], timeout=30)
    eventually(lambda: "signal SIGTERM 1\ndrained" in said())


def test_a_child_whose_launcher_died_before_it_was_ready_drains_too(
    start: Start, said: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start("import time; time.sleep(1)\n" + DRAINS, QUICK="1")
    eventually(lambda: psutil.Process(launcher.pid).children())
    launcher.kill()
    eventually(lambda: "drained" in said(), within_s=30)


def test_a_kill_of_the_group_ends_both(start: Start, said: Callable[[], str], eventually: Callable[..., None]) -> None:
    launcher = start(DRAINS)
    eventually(lambda: "ready" in said())
    child = child_of(launcher)
    os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.wait(30) == -signal.SIGKILL
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert "died" not in said()


def test_a_stopped_child_is_neither_dead_nor_forgotten(
    start: Start, said: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS, QUICK="1")
    eventually(lambda: "ready" in said())
    child = child_of(launcher)
    child.send_signal(signal.SIGSTOP)
    eventually(lambda: child.status() == psutil.STATUS_STOPPED)
    launcher.terminate()
    assert launcher.poll() is None
    child.send_signal(signal.SIGCONT)
    assert launcher.wait(30) == 0


@pytest.mark.parametrize("report", ["raise OSError('no settings')", "import time; time.sleep(60)"])
def test_a_report_that_fails_or_hangs_changes_nothing(start: Start, report: str) -> None:
    broken = "from worker.process import launcher\nlauncher.REPORT_S = 0.2\n"
    broken += f"def report(self, ended):\n    {report}\nlauncher.Launcher.report = report\n"
    assert start("raise SystemExit(70)", prelude=broken).wait(30) == 70


def test_it_stays_small_and_knows_neither_model_nor_queue(
    start: Start, said: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS)
    eventually(lambda: "ready" in said())
    assert psutil.Process(launcher.pid).memory_info().rss < 25 * 2**20
    listing = "import sys, worker.process.launcher; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"mlx", "celery", "flask", "redis", "pydantic"} & set(loaded.stdout.split())
