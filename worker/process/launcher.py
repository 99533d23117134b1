"""The parent of a worker process: `python -m worker.process.launcher`.

It starts `worker.app`, forwards signals and waits. When the worker process dies, the launcher reports what it was
doing, so its jobs continue elsewhere at once and the job to blame can be found. The launcher exits with its child's
status, so a supervisor sees no difference. It imports almost nothing while it waits, to stay small.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from worker.process.cgroup import read_oom_kills
from worker.process.exits import Exit
from worker.process.parent import LAUNCH_VARIABLE, Launch

_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT)
_WORKER: Final = ("-P", "-m", "worker.app")
REPORT_S: Final = 15.0
"""Time limit for the report of a death, which may hang in a name server."""


class Launcher:
    """Runs one worker process."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, *_WORKER)) -> None:
        self._command = command
        self._launch = Launch.new()
        self._child: subprocess.Popen[bytes] | None = None
        self._early_signals: list[int] = []

    def run(self) -> Exit:
        """Start the process and wait for its end."""
        for forwarded in _FORWARDED:
            signal.signal(forwarded, self._forward)
        kills_before, started = read_oom_kills(), time.monotonic()
        self._child = subprocess.Popen(self._command, env=self._environment(os.environ))
        for number in self._early_signals:
            self._child.send_signal(number)
        status = self._child.wait()
        kills_after = read_oom_kills()
        kills = None if kills_after is None or kills_before is None else kills_after - kills_before
        return Exit(status, time.monotonic() - started, kills, self._child.pid)

    def report(self, ended: Exit) -> None:
        """Report the death of the process."""
        # Imported only when needed: settings and the Redis client take 30 MB.
        from worker.process.death import report_exit

        report_exit(ended, self._launch.token)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self._child is None:
            self._early_signals.append(number)
        else:
            self._child.send_signal(number)

    def _environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        paths = [str(_ROOT), *filter(None, [environ.get("PYTHONPATH")])]
        return {**environ, LAUNCH_VARIABLE: self._launch.to_variable(), "PYTHONPATH": os.pathsep.join(paths)}


def end_as(status: int) -> NoReturn:
    """End this process with the same exit status or by the same signal as the child."""
    sys.stdout.flush()
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has already dumped its core
        signal.signal(-status, signal.SIG_DFL) if -status not in {signal.SIGKILL, signal.SIGSTOP} else None
        os.kill(os.getpid(), -status)
        time.sleep(1)
    os._exit(status if status >= 0 else 128 - status)


def main() -> NoReturn:
    """Run one worker process."""
    launcher = Launcher()
    ended = launcher.run()
    if ended.abnormal:
        _report_within(REPORT_S, lambda: launcher.report(ended), ended.status)
    end_as(ended.status)


def _report_within(seconds: float, report: Callable[[], object], status: int) -> None:
    """Report the death. If that takes longer than `seconds`, end this process with the status."""
    timer = threading.Timer(seconds, end_as, [status])
    timer.daemon = True
    timer.start()
    try:
        report()
    except Exception:  # noqa: BLE001 - without a report the leases lapse
        traceback.print_exc()
    timer.cancel()


if __name__ == "__main__":
    main()
