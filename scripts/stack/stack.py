"""The running stack: brought up in order, watched, brought down in order."""

from __future__ import annotations

import http
import http.client
import time
import urllib.parse
from collections.abc import Mapping

import redis

from scripts.stack import aof, config, leftovers
from scripts.stack.failure import StartFailed
from scripts.stack.logs import SupervisorLog, last_line
from scripts.stack.preflight import full_disk
from scripts.stack.screen import Progress, Screen, base_url
from scripts.stack.signals import StopRequested, StopSignals
from scripts.stack.supervision import Child, Supervisor
from shared.queue.redis import connect
from shared.settings import Settings

_POLL_S = 0.3
_SOON_S = 15.0
_START_S = 1800.0
_DOWN_S = 5.0
"""What supervisord has not started again for so long, it has given up."""
_RETRY_S = 30.0
"""Then it is tried again every so often, for ever: it had been up once."""
_FULL_BYTES = 2**20
_ROOM_BYTES = 32 * 2**20
"""A disk that had less than the one has space again when it has the other."""


class Stack:
    """Supervisord and what it keeps running for one DATA_DIR."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], screen: Screen, signals: StopSignals
    ) -> None:
        self._settings = settings
        self._screen = screen
        self._signals = signals
        self._down_since: dict[str, float] = {}
        self._retry_at: dict[str, float] = {}
        self._first_pids: dict[str, int] = {}
        self._full = False
        for stale in settings.run_dir.glob("worker-*.error"):
            stale.unlink()
        config.write(settings)
        self._log = SupervisorLog(settings.log_dir / "supervisord.log")
        self._supervisor = Supervisor(
            config.supervisord_conf_path(settings), config.control_socket(settings), environment
        )

    def bring_up(self) -> None:
        """Start everything and return when a request would be answered.

        Raises:
            StartFailed: a child died, or it took too long.
        """
        with self._screen.waiting("starting") as progress:
            self._wait_for_supervisor()
            for program in config.programs(self._settings):
                progress.update(f"starting {program.name}")
                if program.name == "flower":
                    self._wait_for_api(progress)  # Flower asks the workers who they are, and asks once
                self._supervisor.start(program.name)
                if program.name == "valkey":
                    self._wait_for_queue_or_repair_it()
            self._wait_for_flower()
            self._log.news()

    def watch(self) -> None:
        """Say what happens to the children and see that none stays down, until a signal comes."""
        while True:
            self._signals.pause(1.0)
            self._say_news()
            self._watch_disk()
            self._revive()

    def bring_down(self) -> None:
        """The orderly end; a second signal makes it a quick one. Nothing is left either way."""
        if self._signals.hung_up:
            self._screen.silence()
        try:
            with self._screen.waiting("stopping") as progress:
                self._shut_down(progress)
        except StopRequested:
            self._screen.say("stopping at once")
        finally:
            self._signals.ignore()
            leftovers.end_all(self._settings.data_dir, patience_s=0)

    def _shut_down(self, progress: Progress) -> None:
        deadline = time.monotonic() + config.total_stop_s(self._settings)
        self._supervisor.shutdown()
        progress.update(f"stopping; running jobs get up to {self._settings.drain_s:.0f} s, the rest of them waits")
        while self._supervisor.alive and time.monotonic() < deadline:
            self._say_news()
            self._signals.pause(_POLL_S)
        self._say_news()

    def _wait_for_supervisor(self) -> None:
        deadline = time.monotonic() + _SOON_S
        while not self._supervisor.listening:
            if not self._supervisor.alive or time.monotonic() > deadline:
                raise StartFailed(f"supervisord did not start: {self._supervisor.last_words}")
            self._signals.pause(0.05)

    def _wait_for_queue_or_repair_it(self) -> None:
        try:
            self._wait_for_queue()
        except StartFailed:
            self._supervisor.stop("valkey")
            repair = aof.repair(self._settings)
            if repair is None:
                raise
            self._screen.say(str(repair))
            self._first_pids.pop("valkey", None)
            self._supervisor.start("valkey")
            self._wait_for_queue()

    def _wait_for_queue(self) -> None:
        deadline = time.monotonic() + _START_S  # it reads its whole log first
        while not self._queue_answers():
            self._check_children(deadline)
            self._signals.pause(0.05)

    def _queue_answers(self) -> bool:
        try:
            with connect(self._settings.store_url, timeout_s=2, retries=0) as client:
                return bool(client.ping())
        except redis.RedisError:  # not there yet, or still loading
            return False

    def _wait_for_api(self, progress: Progress) -> None:
        progress.update("loading the model, starting the API")
        self._wait_for_answer(base_url(self._settings.host, self._settings.port) + "/readyz")

    def _wait_for_flower(self) -> None:
        self._wait_for_answer(base_url(self._settings.host, self._settings.flower_port) + "/healthcheck")

    def _wait_for_answer(self, url: str) -> None:
        deadline = time.monotonic() + _START_S
        while not _answers(url):
            self._check_children(deadline)
            self._signals.pause(_POLL_S)
        self._check_children(deadline)

    def _check_children(self, deadline: float) -> None:
        """A child that dies before all are up ends the start: it would die again."""
        for child in self._supervisor.children():
            replaced = child.pid and self._first_pids.setdefault(child.name, child.pid) != child.pid
            if child.failing or replaced:
                raise StartFailed(f"{child.name} did not start: {self._reason(child)} (log: {child.log})")
        if time.monotonic() > deadline:
            raise StartFailed(f"not ready after {_START_S:.0f} s; logs: {self._settings.log_dir}")

    def _reason(self, child: Child) -> str:
        own_words = self._settings.run_dir / f"{child.name}.error"
        return (own_words.read_text().strip() if own_words.exists() else last_line(child.log)) or "it said nothing"

    def _say_news(self) -> None:
        for line in self._log.news():
            self._screen.say(f"{time.strftime('%H:%M:%S')} {line}")

    def _watch_disk(self) -> None:
        """Valkey ends rather than answer what it cannot write. Once there is space, nothing waits for its next turn."""
        full = full_disk(self._settings.data_dir, _ROOM_BYTES if self._full else _FULL_BYTES)
        if full and not self._full:
            self._screen.say(f"{full}; no job is accepted until there is space, and what was accepted is kept")
        elif self._full and not full:
            self._screen.say("the disk has space again")
            given_up = {child.name for child in self._supervisor.children() if child.given_up}
            self._retry_at = dict.fromkeys(given_up, time.monotonic())
        self._full = bool(full)

    def _revive(self) -> None:
        now = time.monotonic()
        for child in self._supervisor.children():
            if not child.given_up:
                self._down_since.pop(child.name, None)
                self._retry_at.pop(child.name, None)
            elif now - self._down_since.setdefault(child.name, now) < _DOWN_S:
                continue  # supervisord is about to start it again
            elif child.name not in self._retry_at:
                self._retry_at[child.name] = now + _RETRY_S
                self._screen.say(f"{child.name} does not stay up: {self._reason(child)}; trying every {_RETRY_S:.0f} s")
            elif now >= self._retry_at[child.name]:
                self._retry_at[child.name] = now + _RETRY_S
                self._supervisor.start_one(child)


def _answers(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
