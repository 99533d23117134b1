"""One Redis and several hosts with different models: a host is cut off from everything and comes back.

Each host has its own network namespace, host name, folder and processes. Clients reach the API of a host over its link.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx2
import pytest

from scripts.client.api import Client, ClientError
from shared.jobs.log import Event, EventKind, event_kind
from shared.jobs.record import Status
from shared.models.registry import Registry
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.settings import ROOT
from tests.chaos import network_faults
from tests.chaos.network_faults import Namespace
from tests.plugins.work import undisturbed
from tests.support.servers import Server
from tests.support.waiting import eventually
from web.access.api_keys import SCOPES, KeyStore

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not network_faults.namespaces_work(), reason="needs root on Linux, for network namespaces"),
]

MODELS = ("alpha", "beta", "gamma")
PORT = 8080
SLOW = "!pause=0.02"
"""Prompt prefix for the fake backend: each step takes 20 ms."""
TOKENS = 400
LEASE_S = 1.0
SILENCE_S = 3.0
"""After this time without an event, a client takes its stream from another host. Heartbeats are more frequent."""
START_WITHIN_S = 120.0


@dataclass
class Host:
    """One machine: a worker with one model, and perhaps an API."""

    name: str
    namespace: Namespace
    env: dict[str, str]
    home: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, module: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process under this machine's host name."""
        rename = ("unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh")
        command = self.namespace.command((*rename, sys.executable, "-m", module))
        with (self.home / f"{module}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env={**self.env, **variables}, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def client(self, key: str) -> Client:
        return Client(f"http://{self.namespace.guest}:{PORT}", key, connections=32)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Cluster:
    """Redis and three hosts; the first two have an API."""

    hosts: list[Host]
    redis: Redis
    key: str

    def clients(self) -> tuple[Client, Client]:
        first, second = (host.client(self.key) for host in self.hosts[:2])
        return first, second


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder, ExitStack() as exits:
        home = Path(folder)
        links = [exits.enter_context(closing(Namespace(number, 0))) for number in range(len(MODELS))]
        addresses = [link.address[0] for link in links]
        lines = (f"bind 127.0.0.1 {' '.join(addresses)}", "appendonly yes", "appendfsync always")
        server = exits.enter_context(closing(Server(home / "redis", "secret", *lines)))
        store = exits.enter_context(closing(connect(f"redis://:secret@127.0.0.1:{server.port}/0")))
        (home / "catalog.toml").write_text(catalog(home))
        key = KeyStore(home / "keys.json").create("tests", SCOPES)
        hosts = [host(home, name, link, server.port) for name, link in zip(MODELS, links, strict=True)]
        for each in hosts:
            exits.callback(each.close)
        yield started(Cluster(hosts, store, key))


def catalog(home: Path) -> str:
    for name in MODELS:
        (home / name).mkdir()
        (home / name / "config.json").write_text("{}")
        (home / name / "model.safetensors").write_bytes(b"")
    return "\n".join(f'[models.{name}]\npath = "{home / name}"' for name in MODELS)


def host(home: Path, model: str, link: Namespace, port: int) -> Host:
    own = home / f"host-{model}"
    (own / "data/run").mkdir(parents=True)
    shutil.copy(home / "keys.json", own / "data/keys.json")
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "ENV_FILE": os.devnull,
        "DATA_DIR": str(own / "data"),
        "REDIS_URL": f"redis://:secret@{link.address[0]}:{port}/0",
        "MODELS_FILE": str(home / "catalog.toml"),
        "WORKER_MODELS": model,
        "LOAD_ON_DEMAND": "false",
        "BACKEND": "fake",
        "SLOTS": "2",
        "LEASE_S": str(LEASE_S),
        "HEARTBEAT_S": "0.5",
        "DRAIN_S": "0.5",
        "HOST": link.guest,
        "PORT": str(PORT),
        "RATE_LIMIT": "1000000/minute",
    }
    return Host(f"host-{model}", link, variables, own)


def started(cluster: Cluster) -> Cluster:
    """Start all processes and wait for them."""
    for each in cluster.hosts[:2]:
        each.start("web")
    for each in cluster.hosts:
        each.start("worker.process.launcher")
    registry = Registry(cluster.redis)
    for client in cluster.clients():
        with client:
            eventually(partial(answers, client), "the API answers", START_WITHIN_S)
    eventually(lambda: ready_models(registry) == {*MODELS}, "all workers are ready", START_WITHIN_S)
    assert {worker.host for worker in registry.workers()} == {each.name for each in cluster.hosts}
    return cluster


def answers(client: Client) -> bool:
    try:
        return client.request("GET", "/livez").is_success
    except ClientError:
        return False


def ready_models(registry: Registry) -> set[str]:
    return {worker.model for worker in registry.workers() if worker.state == "ready"}


def submit(client: Client, model: str, number: int) -> str:
    body = {"model": model, "prompt": prompt(number), "max_tokens": TOKENS, "temperature": 0, "seed": 0}
    return client.submit(body, idempotency_key=f"{model}-{number}").id


def prompt(number: int) -> str:
    return f"{SLOW} {number}"


def read(host: Host, key: str, job: str, after: int = 0) -> list[Event]:
    """Read a stream until it ends, breaks, or is silent for too long."""
    events: list[Event] = []
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream", "Last-Event-ID": str(after)}
    url = f"http://{host.namespace.guest}:{PORT}/v1/jobs/{job}/stream"
    with (
        suppress(httpx2.TransportError),
        httpx2.Client(timeout=SILENCE_S, trust_env=False) as http,
        http.stream("GET", url, headers=headers) as response,
    ):
        received = (event for event in httpx2.EventSource(response, max_event_size=None) if event.data)
        events.extend(Event(int(event.id), event_kind(event.event), event.data) for event in received)
    return events


def follow(cluster: Cluster, job: str) -> tuple[list[Event], bool]:
    """Read a stream from the first host, and the rest from the second one; also say whether there was a rest."""
    first = read(cluster.hosts[0], cluster.key, job)
    events = list(first)
    until = time.monotonic() + 60
    while not (events and events[-1].kind is EventKind.DONE):
        assert time.monotonic() < until, f"{job} does not end"
        events += read(cluster.hosts[1], cluster.key, job, events[-1].n if events else 0)
    return events, len(events) > len(first)


def check_events(events: Sequence[Event], number: int) -> None:
    """Check that events have no gap or duplicate, end once, and give the text of an undisturbed run."""
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events].count(EventKind.DONE) == 1
    texts = [json.loads(event.data)["text"] for event in events if event.kind is EventKind.CHUNK]
    assert "".join(texts) == undisturbed(prompt(number), TOKENS)


def test_a_host_is_cut_off_and_comes_back(cluster: Cluster) -> None:
    lost = cluster.hosts[0]
    first, second = cluster.clients()
    with first, second, ThreadPoolExecutor(16) as pool:
        jobs = {submit(first, model, number): (model, number) for model in MODELS for number in range(3)}
        own = [job for job, (model, _) in jobs.items() if model == "alpha"]
        others = [job for job in jobs if job not in own]
        streams = {job: pool.submit(follow, cluster, job) for job in jobs}
        eventually(lambda: running(second, jobs) == 6, "all rows of all workers are taken")
        with cut(lost):
            eventually(lambda: states(second, own) == {Status.QUEUED}, "the jobs of the lost host wait again")
            eventually(lambda: states(second, others) == {Status.SUCCEEDED}, "the jobs of the other hosts end", 60)
            assert states(second, own) == {Status.QUEUED}
            check_streams(jobs, streams, others)
        eventually(lambda: states(second, own) == {Status.SUCCEEDED}, "the jobs of the lost host end", 60)
        check_streams(jobs, streams, own)
        for job, (_, number) in jobs.items():  # from its beginning, from the host that was away
            check_events(list(first.events(job)), number)
    attempts = {job: int(cluster.redis.hget(keys.JOB + job, "attempt") or 0) for job in jobs}
    assert {attempts[job] for job in others} == {1}
    # Two were running; the third was at most claimed.
    assert sorted(attempts[job] for job in own) in ([1, 2, 2], [2, 2, 2])
    assert cluster.redis.hgetall(keys.ENDED) == {f"{model}:succeeded": "3" for model in MODELS}


@contextmanager
def cut(host: Host) -> Iterator[None]:
    """Cut a host off during the block."""
    host.namespace.cut()
    try:
        yield
    finally:  # also after a failure: threads wait for the streams of its jobs
        host.namespace.restore()


def running(client: Client, jobs: Iterable[str]) -> int:
    return sum(client.job(job).status is Status.RUNNING for job in jobs)


def states(client: Client, jobs: Sequence[str]) -> set[Status]:
    return {client.job(job).status for job in jobs}


def check_streams(
    jobs: dict[str, tuple[str, int]], streams: dict[str, Future[tuple[list[Event], bool]]], ended: Sequence[str]
) -> None:
    """Check the streams of ended jobs. All began on the lost host, and the other one continued them."""
    for job in ended:
        events, continued = streams[job].result(60)
        check_events(events, jobs[job][1])
        assert continued, f"the stream of {job} did not change the host"
