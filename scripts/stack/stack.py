"""A running stack: supervisord and its children, from start to shutdown."""

from __future__ import annotations

import time
from collections.abc import Mapping

from scripts.stack import config, processes
from scripts.stack.logs import SupervisorLog
from scripts.stack.preflight import disk_full
from scripts.stack.signals import StopRequested, StopSignals
from scripts.stack.startup import Startup
from scripts.stack.supervision import Supervisor
from scripts.stack.terminal import Status, Terminal
from shared.settings import Settings

_POLL_S = 0.3
_DOWN_S = 5.0
"""After this time, supervisord has given up on a child that is down."""
_RETRY_S = 30.0
"""Interval between further starts of such a child. It has run before, so the retries never end."""
_MIN_FREE_BYTES = 2**20
_RECOVERED_FREE_BYTES = 32 * 2**20
"""Free bytes below which a disk counts as full, and above which it counts as recovered."""


class Stack:
    """supervisord and its children for one DATA_DIR."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], terminal: Terminal, signals: StopSignals
    ) -> None:
        self._settings = settings
        self._terminal = terminal
        self._signals = signals
        self._down_since: dict[str, float] = {}
        self._retry_at: dict[str, float] = {}
        self._disk_full = False
        config.write(settings)
        self._log = SupervisorLog(settings.log_dir / "supervisord.log")
        self._supervisor = Supervisor(
            config.supervisord_conf_path(settings), config.control_socket(settings), environment
        )
        self._startup = Startup(settings, self._supervisor, terminal, signals)

    def bring_up(self) -> None:
        """Start everything; return when the service answers requests.

        Raises:
            StartFailed: a child exited, or was not ready in time.
        """
        self._startup.run()
        self._log.read_events()

    def watch(self) -> None:
        """Report what happens to the children and restart those that stay down, until a stop signal arrives."""
        while True:
            self._signals.pause(1.0)
            self._print_events()
            self._watch_disk()
            self._restart_stopped()

    def bring_down(self) -> None:
        """Shut down in order; at a second signal, at once. In both cases no process is left."""
        if self._signals.hung_up:
            self._terminal.mute()
        try:
            with self._terminal.status("stopping") as status:
                self._shut_down(status)
        except StopRequested:
            self._terminal.print("stopping at once")
        finally:
            self._signals.ignore()
            processes.terminate_all(self._settings.data_dir, grace_s=0)
            self._supervisor.close()

    def _shut_down(self, status: Status) -> None:
        deadline = time.monotonic() + config.total_stop_s(self._settings)
        self._supervisor.shutdown()
        status.update(f"stopping; running jobs get up to {self._settings.drain_s:.0f} s, unfinished ones stay queued")
        while self._supervisor.alive and time.monotonic() < deadline:
            self._print_events()
            self._signals.pause(_POLL_S)
        self._print_events()

    def _print_events(self) -> None:
        for event in self._log.read_events():
            self._terminal.print(f"{time.strftime('%H:%M:%S')} {event}")

    def _watch_disk(self) -> None:
        """Report a full disk. Valkey exits if it cannot write; once there is space, restart it without delay."""
        full = disk_full(self._settings.data_dir, _RECOVERED_FREE_BYTES if self._disk_full else _MIN_FREE_BYTES)
        if full and not self._disk_full:
            self._terminal.print(f"{full}; no job is accepted until there is space, and accepted jobs are kept")
        elif self._disk_full and not full:
            self._terminal.print("the disk has space again")
            stopped = {child.name for child in self._supervisor.children() if child.stopped_for_good}
            self._retry_at = dict.fromkeys(stopped, time.monotonic())
        self._disk_full = bool(full)

    def _restart_stopped(self) -> None:
        now = time.monotonic()
        for child in self._supervisor.children():
            if not child.stopped_for_good:
                self._down_since.pop(child.name, None)
                self._retry_at.pop(child.name, None)
            elif now - self._down_since.setdefault(child.name, now) < _DOWN_S:
                continue  # supervisord may be about to restart it
            elif child.name not in self._retry_at:
                self._retry_at[child.name] = now + _RETRY_S
                reason = self._startup.failure_reason(child)
                self._terminal.print(f"{child.name} does not stay up: {reason}; retrying every {_RETRY_S:.0f} s")
            elif now >= self._retry_at[child.name]:
                self._retry_at[child.name] = now + _RETRY_S
                self._supervisor.start_one(child)
