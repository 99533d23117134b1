"""The parent of a worker process: `python -m worker.process.launcher`.

It starts `worker.app`, passes signals on, and waits. When the worker process dies it reports what that was doing, so
that its jobs continue elsewhere at once and the job that is to blame is found. It ends as its child ended: supervision
sees no difference. While it waits it holds nothing but the interpreter.
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
from worker.process.parent import VARIABLE, Launch

_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT)
_WORKER: Final = ("-P", "-m", "worker.app")
REPORT_S: Final = 15.0
"""Bound on the report of a death, also where a name server hangs."""


class Launcher:
    """One worker process, from its start to its end."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, *_WORKER)) -> None:
        self._command = command
        self._launch = Launch.new()
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def run(self) -> Exit:
        """Start the process and wait for its end."""
        for forwarded in _FORWARDED:
            signal.signal(forwarded, self._forward)
        kills_before, started = read_oom_kills(), time.monotonic()
        self._child = subprocess.Popen(self._command, env=self._environment(os.environ))
        for number in self._early:
            self._child.send_signal(number)
        status = self._child.wait()
        kills = read_oom_kills()
        new = None if kills is None or kills_before is None else kills - kills_before
        return Exit(status, time.monotonic() - started, new, self._child.pid)

    def report(self, ended: Exit) -> None:
        """Report a death."""
        # Not before it is needed: settings and the Redis client take 30 MB.
        from worker.process.death import report_exit

        report_exit(ended, self._launch.token)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)

    def _environment(self, mine: Mapping[str, str]) -> dict[str, str]:
        paths = [str(_ROOT), *filter(None, [mine.get("PYTHONPATH")])]
        return {**mine, VARIABLE: self._launch.to_variable(), "PYTHONPATH": os.pathsep.join(paths)}


def end_as(status: int) -> NoReturn:
    """End this process as one that had this status: by the same signal, if it was one."""
    sys.stdout.flush()
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child's dump is the one that matters
        signal.signal(-status, signal.SIG_DFL) if -status not in {signal.SIGKILL, signal.SIGSTOP} else None
        os.kill(os.getpid(), -status)
        time.sleep(1)
    os._exit(status if status >= 0 else 128 - status)


def main() -> NoReturn:
    """Run one worker process."""
    launcher = Launcher()
    ended = launcher.run()
    if ended.abnormal:
        _within(REPORT_S, lambda: launcher.report(ended), ended.status)
    end_as(ended.status)


def _within(seconds: float, report: Callable[[], object], status: int) -> None:
    """Report; if that hangs, end this process with the status after `seconds`."""
    timer = threading.Timer(seconds, end_as, [status])
    timer.daemon = True
    timer.start()
    try:
        report()
    except Exception:  # noqa: BLE001 - the leases lapse by themselves
        traceback.print_exc()
    timer.cancel()


if __name__ == "__main__":
    main()
