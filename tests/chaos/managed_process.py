"""A process that is restarted when it exits. Exits that a test did not cause are recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from shared.settings import ROOT

_STOP_TIMEOUT_S: Final = 30.0
_RESTART_DELAY_S: Final = 0.3
_STATUS_AFTER: Final[dict[int, int]] = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0}
"""Expected exit status by signal."""


class ManagedProcess:
    """One process in a process group of its own.

    Attributes:
        unexpected_exits: exit statuses that neither a signal from here nor `allow_exit` explains.
    """

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self.unexpected_exits: list[int] = []
        self._allowed_until: dict[int, float] = {}
        self._expected: set[int] = set()
        self._command = list(command)
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at = 0.0
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process id; None if it is not running."""
        with self._lock:
            return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def child(self) -> psutil.Process | None:
        """Its first child, which for a launcher is the worker."""
        try:
            return next(iter(psutil.Process(self.pid).children()), None) if self.pid is not None else None
        except psutil.Error:
            return None

    def ensure_running(self) -> None:
        """Start the process if it is not running and its downtime is over."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._record_exit(self._process.returncode)
                self._process = None
                self._start_at = max(self._start_at, time.monotonic() + _RESTART_DELAY_S)
            if self._process is None and time.monotonic() >= self._start_at:
                self._process = self._start()

    def allow_exit(self, status: int, for_s: float) -> None:
        """Expect exits with a status for the next `for_s` seconds."""
        with self._lock:
            self._allowed_until[status] = time.monotonic() + for_s

    def kill(self, down_s: float = 0.0) -> bool:
        """Kill it and its children, and do not restart it for `down_s` seconds; return whether it was running."""
        with self._lock:
            was_running = self._signal(signal.SIGKILL)
            if was_running:
                self._start_at = time.monotonic() + down_s
            return was_running

    def kill_child(self) -> bool:
        """Kill only its child; its own exit is then expected. Return whether there was a child."""
        child = self.child
        if child is None:
            return False
        with self._lock:
            self._expected.add(-signal.SIGKILL)
        try:
            child.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def signal(self, number: int) -> bool:
        """Send a signal to it and its children; return whether it was running."""
        with self._lock:
            return self._signal(number)

    def stop(self) -> int | None:
        """Terminate it and wait; return its exit status, or None if it was not running."""
        with self._lock:
            process = self._process
        if process is None or process.poll() is not None:
            return None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return process.wait()

    def _signal(self, number: int) -> bool:
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        if number in _STATUS_AFTER:
            self._expected.add(_STATUS_AFTER[number])
        return True

    def _record_exit(self, status: int) -> None:
        if status not in self._expected and time.monotonic() > self._allowed_until.get(status, 0.0):
            self.unexpected_exits.append(status)
        self._expected.clear()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=self._env, stdout=log, stderr=log, start_new_session=True
            )
