"""What the way of a token and of a submit costs when the model costs nothing: one process of each kind.

CPU time is what counts on a machine with few cores: all four processes share them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tests.bench.checkouts import Checkout
from tests.bench.modelless import KEY, Stack, modelless
from tests.bench.processes import asked

_JOBS = {1: 300, 8: 1500, 32: 3000}
"""Jobs submitted by so many clients."""


def _client(module: str, stack: Stack, **question: Any) -> dict[str, Any]:
    """What the client process tells."""
    told: dict[str, Any] = asked(module, {"port": stack.port, "key": KEY, **question}, 600)
    return told


@dataclass(frozen=True, slots=True)
class Case:
    """Streams at once, tokens each, and the seconds between two steps of the engine."""

    streams: int
    tokens: int
    every_s: float

    def run(self, stack: Stack) -> dict[str, Any]:
        """What the reader saw."""
        body = {"prompt": f"Go on. !clock=1 !every={self.every_s}", "max_tokens": self.tokens}
        return _client("reader", stack, streams=self.streams, body=body, pids=stack.pids())


CASES = {
    "64 streams, a step each 1 ms": Case(64, 4000, 0.001),
    "64 streams, a step each 4 ms": Case(64, 2000, 0.004),
    "1,000 streams, a step each 200 ms": Case(1000, 150, 0.2),
    "1 stream, a step each 20 ms": Case(1, 250, 0.02),
}


def pipeline(rounds: int, checkout: Checkout | None = None) -> dict[str, list[dict[str, Any]]]:
    """Every case once a round."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        with modelless(checkout=checkout, SLOTS="1024") as stack:
            for name, case in CASES.items():
                results[name].append(case.run(stack))
    return results


def submits(rounds: int, checkout: Checkout | None = None) -> dict[str, list[dict[str, Any]]]:
    """Jobs of one token, submitted where no worker takes them, and where one does."""
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for worker in (False, True):
            with modelless(worker=worker, checkout=checkout, SLOTS="32", MAX_QUEUE="1000000") as stack:
                for clients, jobs in _JOBS.items():
                    name = f"{clients} clients, {'a worker' if worker else 'no worker'}"
                    results.setdefault(name, []).append(submit(stack, clients, jobs))
    return results


def submit(stack: Stack, clients: int, jobs: int) -> dict[str, Any]:
    """What the submitter saw of so many jobs, and the CPU that each took."""
    before = stack.cpu_s()
    told = _client("submitter", stack, clients=clients, jobs=jobs, body={"prompt": "Hi", "max_tokens": 1})
    cpu = {name: 1000 * (seconds - before[name]) / jobs for name, seconds in stack.cpu_s().items()}
    return {**told, "cpu_ms_per_job": cpu}


def _median(told: list[dict[str, Any]], *names: str) -> float:
    def find(one: Any) -> float:
        for name in names:
            one = one[name]
        return float(one)

    return statistics.median(find(one) for one in told)


def pipeline_table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """What people read."""
    out = Table("streams", title="the token path with a fake model; CPU is milliseconds a 1,000 tokens")
    processes = ("worker", "valkey", "web", "client")
    for heading in ("tokens/s", "tokens/event", "delivery p50 ms", "p99 ms", *(f"CPU {name}" for name in processes)):
        out.add_column(heading, justify="right")
    for name, told in results.items():
        cpu = (f"{_median(told, 'cpu_ms_per_1000_tokens', process):.1f}" for process in processes)
        ways = (f"{_median(told, figure):.1f}" for figure in ("delay_p50_ms", "delay_p99_ms"))
        speed, density = _median(told, "tokens_per_s"), _median(told, "tokens_per_event")
        out.add_row(name, f"{speed:,.0f}", f"{density:.2f}", *ways, *cpu)
    return out


def submits_table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """What people read."""
    out = Table("submits", title="jobs accepted by one API process; CPU is milliseconds a job")
    for heading in ("jobs/s", "p50 ms", "p99 ms", "CPU web", "CPU valkey"):
        out.add_column(heading, justify="right")
    for name, told in results.items():
        figures = (("jobs_per_s",), ("p50_ms",), ("p99_ms",), ("cpu_ms_per_job", "web"), ("cpu_ms_per_job", "valkey"))
        out.add_row(name, *(f"{_median(told, *figure):.2f}" for figure in figures))
    return out
