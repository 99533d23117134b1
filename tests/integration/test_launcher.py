"""The launcher with a small Python child: signals, exit statuses, and what happens when either process dies."""

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
"""The real launcher with another command and a report that only prints."""

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
    """Return a function that starts a launcher with a child. Both are killed after the test."""
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
def output(tmp_path: Path) -> Callable[[], str]:
    return (tmp_path / "out").read_text


def child_of(launcher: subprocess.Popen[bytes]) -> psutil.Process:
    [child] = psutil.Process(launcher.pid).children()
    return child


@pytest.mark.parametrize("status", [0, 1, 70, 78])
def test_it_exits_with_the_childs_status(start: Start, output: Callable[[], str], status: int) -> None:
    assert start(f"raise SystemExit({status})").wait(30) == status
    assert ("died:" in output()) == (status not in (0, 78))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_it_ends_by_the_signal_that_ended_the_child(
    start: Start, output: Callable[[], str], number: signal.Signals
) -> None:
    assert start(f"import os; os.kill(os.getpid(), {int(number)})").wait(30) == -number
    assert f"died: signal {int(number)} ({number.name})" in output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_signal_is_forwarded(
    start: Start, output: Callable[[], str], eventually: Callable[..., None], number: signal.Signals
) -> None:
    launcher = start(DRAINS)
    eventually(lambda: "ready" in output())
    for count in (1, 2):
        launcher.send_signal(number)
        eventually(lambda: f"signal {number.name} {count}" in output())  # noqa: B023 - called at once
    assert launcher.wait(30) == 0
    assert "drained" in output()


def test_a_child_whose_launcher_is_killed_drains_and_ends(
    start: Start, output: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS, QUICK="1")
    eventually(lambda: "ready" in output())
    child = child_of(launcher)
    launcher.kill()
    assert launcher.wait(30) == -signal.SIGKILL
    psutil.wait_procs([child], timeout=30)
    eventually(lambda: "signal SIGTERM 1\ndrained" in output())


def test_a_child_whose_launcher_died_before_it_was_ready_drains_and_ends(
    start: Start, output: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start("import time; time.sleep(1)\n" + DRAINS, QUICK="1")
    eventually(lambda: psutil.Process(launcher.pid).children())
    launcher.kill()
    eventually(lambda: "drained" in output(), within_s=30)


def test_sigkill_to_the_process_group_ends_both(
    start: Start, output: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS)
    eventually(lambda: "ready" in output())
    child = child_of(launcher)
    os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.wait(30) == -signal.SIGKILL
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert "died" not in output()


def test_a_stopped_child_is_not_reported_and_gets_signals_later(
    start: Start, output: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS, QUICK="1")
    eventually(lambda: "ready" in output())
    child = child_of(launcher)
    child.send_signal(signal.SIGSTOP)
    eventually(lambda: child.status() == psutil.STATUS_STOPPED)
    launcher.terminate()
    assert launcher.poll() is None
    child.send_signal(signal.SIGCONT)
    assert launcher.wait(30) == 0


@pytest.mark.parametrize("report", ["raise OSError('no settings')", "import time; time.sleep(60)"])
def test_a_report_that_fails_or_hangs_does_not_change_the_status(start: Start, report: str) -> None:
    broken = "from worker.process import launcher\nlauncher.REPORT_S = 0.2\n"
    broken += f"def report(self, ended):\n    {report}\nlauncher.Launcher.report = report\n"
    assert start("raise SystemExit(70)", prelude=broken).wait(30) == 70


def test_it_stays_small_and_imports_neither_models_nor_the_queue(
    start: Start, output: Callable[[], str], eventually: Callable[..., None]
) -> None:
    launcher = start(DRAINS)
    eventually(lambda: "ready" in output())
    assert psutil.Process(launcher.pid).memory_info().rss < 25 * 2**20
    listing = "import sys, worker.process.launcher; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"mlx", "celery", "flask", "redis", "pydantic"} & set(loaded.stdout.split())
