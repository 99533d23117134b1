"""Bringing a stack up: start the programs in order and wait until each is ready.

Every wait ends when the program is ready, a child exits, or a time limit is reached. Errors give the child's reason.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from scripts.stack import aof, config, logs, probes
from scripts.stack.failure import StartFailed
from scripts.stack.preflight import port_taken
from scripts.stack.signals import StopSignals
from scripts.stack.supervision import Child, Supervisor
from scripts.stack.terminal import Status, Terminal, base_url
from shared.settings import Settings

RESPONSE_S = 60.0
"""Time limit for a program that is not loading anything, including Python's imports on a busy machine."""
LOADING_S = 1800.0
"""Time limit for loading: Valkey reads its whole log, a worker reads its model from a disk that may be slow."""
_POLL_S = 0.3
_VALKEY_POLL_S = 0.05
_SUPERVISOR_S = 15.0
_PORT_TAKEN = re.compile(r"Can't connect to|Connection in use|Address already in use")


class Startup:
    """One start of the programs of a stack, under a supervisord that was just started."""

    def __init__(self, settings: Settings, supervisor: Supervisor, terminal: Terminal, signals: StopSignals) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._terminal = terminal
        self._signals = signals
        self._first_pids: dict[str, int] = {}
        self._log_offsets = {path.name: logs.size(path) for path in settings.log_dir.glob("*.log")}
        for stale in settings.run_dir.glob("*.error"):
            stale.unlink()

    def run(self) -> None:
        """Start all programs; return when the service answers requests.

        Raises:
            StartFailed: a program exited, or was not ready in time.
        """
        with self._terminal.status("starting") as status:
            self._wait_for_supervisor()
            for program in config.programs(self._settings):
                status.update(f"starting {program.name}")
                if program.name == "flower":
                    self._wait_for_api(status)  # Flower inspects the workers only once, when it starts
                self._supervisor.start(program.name)
                if program.name == "valkey":
                    self._wait_for_valkey_or_repair_it()
            self._wait_for_flower()

    def failure_reason(self, child: Child) -> str:
        """Return why a child failed: from its error file, or else the last error in its log since the start."""
        error_file = self._settings.run_dir / f"{child.name}.error"
        if error_file.exists():
            return error_file.read_text().strip()
        reason = logs.last_error(child.log, self._log_offsets.get(child.log.name, 0))
        port = {"web": "PORT", "flower": "FLOWER_PORT"}.get(child.program)
        if port and _PORT_TAKEN.search(reason):
            return port_taken(port, getattr(self._settings, port.lower()))
        return reason or "it printed nothing"

    def _wait_for_supervisor(self) -> None:
        deadline = time.monotonic() + _SUPERVISOR_S
        while not self._supervisor.listening:
            if not self._supervisor.alive or time.monotonic() > deadline:
                raise StartFailed(f"supervisord did not start: {self._supervisor.last_output}")
            self._signals.pause(_VALKEY_POLL_S)

    def _wait_for_valkey_or_repair_it(self) -> None:
        try:
            self._wait_for_valkey()
        except StartFailed:
            self._supervisor.stop("valkey")
            repair = aof.repair(self._settings)
            if repair is None:
                raise
            self._terminal.print(str(repair))
            self._first_pids.pop("valkey", None)
            self._supervisor.start("valkey")
            self._wait_for_valkey()

    def _wait_for_valkey(self) -> None:
        self._wait_until_ready(
            "valkey",
            lambda: probes.redis_answers(self._settings),
            loading=lambda: probes.redis_is_loading(self._settings),
            poll_s=_VALKEY_POLL_S,
        )

    def _wait_for_api(self, status: Status) -> None:
        status.update("loading the model, starting the API")
        url = base_url(self._settings.host, self._settings.port)
        self._wait_until_ready("web", lambda: probes.is_ok(f"{url}/livez"))
        self._wait_until_ready(
            "worker",
            lambda: probes.is_ok(f"{url}/readyz"),
            loading=lambda: probes.worker_is_loading(self._settings),
            reason=lambda: probes.health_reasons(url, self._settings.mlxq_api_key.get_secret_value()),
        )

    def _wait_for_flower(self) -> None:
        url = base_url(self._settings.flower_host, self._settings.flower_port)
        self._wait_until_ready("flower", lambda: probes.is_ok(f"{url}/healthcheck"))

    def _wait_until_ready(
        self,
        program: str,
        ready: Callable[[], bool],
        *,
        loading: Callable[[], bool] = lambda: False,
        reason: Callable[[], str] = lambda: "",
        poll_s: float = _POLL_S,
    ) -> None:
        """Wait for a program while all children run.

        Args:
            loading: whether the program is loading data; meanwhile `RESPONSE_S` does not count.
            reason: why it is not ready, if it can report that itself.

        Raises:
            StartFailed: a child exited, or the program was not ready in time.
        """
        started_at = idle_since = time.monotonic()
        while not ready():
            self._check_children()
            now = time.monotonic()
            if loading():
                idle_since = now
            if now > min(idle_since + RESPONSE_S, started_at + LOADING_S):
                raise self._not_ready(program, now - started_at, reason())
            self._signals.pause(poll_s)
        self._check_children()

    def _check_children(self) -> None:
        """Fail if a child has exited, even if supervisord has restarted it: it would exit again."""
        for child in self._supervisor.children():
            restarted = child.pid and self._first_pids.setdefault(child.name, child.pid) != child.pid
            if child.failing or restarted:
                raise StartFailed(f"{child.name} did not start: {self.failure_reason(child)} (log: {child.log})")

    def _not_ready(self, program: str, waited_s: float, reason: str) -> StartFailed:
        child = next(child for child in self._supervisor.children() if child.program == program)
        reason = " ".join(filter(None, (reason, self.failure_reason(child))))
        return StartFailed(f"{child.name} is not ready after {waited_s:.0f} s: {reason} (log: {child.log})")
