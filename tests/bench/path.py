"""The costs of queue and token path: the latency of the queue, and tokens and submissions without a model.

Without a model there is one process of each kind. CPU time matters most: the processes share the machine's cores.
"""

from __future__ import annotations

import json
import statistics
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from tests.bench.checkouts import Checkout
from tests.bench.contenders import own_stack
from tests.bench.endpoints import Own
from tests.bench.modelless import KEY, Stack, modelless
from tests.bench.processes import run_module
from tests.bench.samples import quantile

_HOP_JOBS: Final = 100
_WARM_JOBS: Final = 10
_JOBS: Final = {1: 300, 8: 1500, 32: 3000}
"""Number of clients → jobs that they submit together."""

Rounds = dict[str, list[dict[str, Any]]]
"""Case → figures of each round."""


def queue_hop(model: Path) -> dict[str, float]:
    """Milliseconds from acceptance to insertion in the engine (`timings.queue_s`), of jobs sent one after another."""
    with own_stack(model, 32) as served:
        for _ in range(_WARM_JOBS):
            _queue_s(served.endpoint)
        waits = [_queue_s(served.endpoint) * 1000 for _ in range(_HOP_JOBS)]
    return {"jobs": _HOP_JOBS, "p50_ms": statistics.median(waits), "p99_ms": quantile(waits, 0.99)}


def _queue_s(endpoint: Own) -> float:
    body = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"{endpoint.url}/inference", json.dumps(body).encode(), {**endpoint.headers, "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return float(json.load(response)["timings"]["queue_s"])


@dataclass(frozen=True, slots=True)
class Case:
    """Concurrent streams, tokens of each, and the seconds between two steps of the engine.

    Attributes:
        chat: whether the streams are chat completions; otherwise those of `/inference`.
    """

    streams: int
    tokens: int
    every_s: float
    chat: bool = False

    def run(self, stack: Stack) -> dict[str, Any]:
        """The figures of the client process."""
        prompt, path = f"Go on. !clock=1 !every={self.every_s}", "/v1/chat/completions" if self.chat else "/inference"
        question = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        body = {**question, "max_tokens": self.tokens}
        return _client("reader", stack, path=path, streams=self.streams, body=body, pids=stack.pids())


CASES: Final = {
    "64 streams, a step each 1 ms": Case(64, 4000, 0.001),
    "64 streams, a step each 4 ms": Case(64, 2000, 0.004),
    "1,000 streams, a step each 200 ms": Case(1000, 150, 0.2),
    "1 stream, a step each 20 ms": Case(1, 250, 0.02),
    "64 chat completions, a step each 1 ms": Case(64, 4000, 0.001, chat=True),
    "1,000 chat completions, a step each 200 ms": Case(1000, 150, 0.2, chat=True),
}


def pipeline(rounds: int, checkout: Checkout | None = None) -> Rounds:
    """Every case once per round."""
    results: Rounds = {name: [] for name in CASES}
    for _ in range(rounds):
        with modelless(checkout=checkout, SLOTS="1024") as stack:
            for name, case in CASES.items():
                results[name].append(case.run(stack))
    return results


def submits(rounds: int, checkout: Checkout | None = None) -> Rounds:
    """Submissions of jobs of one token, without a worker and with one."""
    results: Rounds = {}
    for _ in range(rounds):
        for worker in (False, True):
            with modelless(
                worker=worker, checkout=checkout, SLOTS="32", MAX_QUEUE="1000000", MAX_QUEUE_PER_KEY="1000000"
            ) as stack:
                for clients, jobs in _JOBS.items():
                    name = f"{clients} clients, {'a worker' if worker else 'no worker'}"
                    results.setdefault(name, []).append(submit(stack, clients, jobs))
    return results


def submit(stack: Stack, clients: int, jobs: int) -> dict[str, Any]:
    """The figures of the client process for this many jobs, and each process's CPU time per job."""
    before = stack.cpu_s()
    figures = _client("submitter", stack, clients=clients, jobs=jobs, body={"prompt": "Hi", "max_tokens": 1})
    cpu = {name: 1000 * (seconds - before[name]) / jobs for name, seconds in stack.cpu_s().items()}
    return {**figures, "cpu_ms_per_job": cpu}


def _client(module: str, stack: Stack, **parameters: Any) -> dict[str, Any]:
    figures: dict[str, Any] = run_module(module, {"port": stack.port, "key": KEY, **parameters}, 600)
    return figures


def _median(rounds: list[dict[str, Any]], *names: str) -> float:
    """The median over rounds of a figure, which may be nested."""

    def find(figures: Any) -> float:
        for name in names:
            figures = figures[name]
        return float(figures)

    return statistics.median(map(find, rounds))


def pipeline_table(results: Rounds) -> Table:
    """The figures for the terminal."""
    out = Table("streams", title="token path without a model; CPU in milliseconds per 1,000 tokens")
    processes = ("worker", "valkey", "web", "client")
    for heading in ("tokens/s", "tokens/event", "delivery p50 ms", "p99 ms", *(f"CPU {name}" for name in processes)):
        out.add_column(heading, justify="right")
    for name, rounds in results.items():
        cpu = (f"{_median(rounds, 'cpu_ms_per_1000_tokens', process):.1f}" for process in processes)
        delays = (f"{_median(rounds, figure):.1f}" for figure in ("delay_p50_ms", "delay_p99_ms"))
        speed, density = _median(rounds, "tokens_per_s"), _median(rounds, "tokens_per_event")
        out.add_row(name, f"{speed:,.0f}", f"{density:.2f}", *delays, *cpu)
    return out


def submits_table(results: Rounds) -> Table:
    """The figures for the terminal."""
    out = Table("submissions", title="jobs accepted by one API process; CPU in milliseconds per job")
    for heading in ("jobs/s", "p50 ms", "p99 ms", "CPU web", "CPU valkey"):
        out.add_column(heading, justify="right")
    for name, rounds in results.items():
        figures = (("jobs_per_s",), ("p50_ms",), ("p99_ms",), ("cpu_ms_per_job", "web"), ("cpu_ms_per_job", "valkey"))
        out.add_row(name, *(f"{_median(rounds, *figure):.2f}" for figure in figures))
    return out
