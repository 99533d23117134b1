"""What traces cost: the same jobs on a stack that sends traces and on one that does not, in turns.

    python -m tests.bench.tracing --rounds 7

Throughput depends on what else the machine does. The processor time of the API and of the worker depends on that much
less, so it is measured, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from scripts.client.api import Client
from shared.settings import ROOT
from tests.plugins.stack import Stack, made_stack
from tests.support.collector import Collector

CLIENTS: Final = 32
TOKENS: Final = 128
MODEL: Final = ROOT / "models/tiny-random-llama"


class Round(NamedTuple):
    """The figures of one round: seconds of wall clock, and of processor time of the API and of the worker."""

    wall_s: float
    api_s: float
    worker_s: float


@contextmanager
def running(model: Path, **variables: str) -> Iterator[Stack]:
    """Start an API and a worker."""
    for stack in made_stack(model, {"SLOTS": str(CLIENTS), **variables}):
        stack.start_web()
        stack.start_worker()
        yield stack


def processor_s(stack: Stack, index: int) -> float:
    """Return the processor time of a process of the stack and of its children."""
    parent = psutil.Process(stack.processes[index].pid)
    times = [each.cpu_times() for each in (parent, *parent.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def one_round(stack: Stack, client: Client, jobs: int) -> Round:
    """Run jobs, one per client at a time, and measure them."""

    def run(number: int) -> None:
        job = client.submit({"prompt": f"Tell me a story, number {number}.", "max_tokens": TOKENS, "seed": number})
        while not client.job(job.id, wait_s=30).status.terminal:
            pass

    before, began = (processor_s(stack, 0), processor_s(stack, 1)), time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(run, range(jobs)))
    wall_s = time.monotonic() - began
    return Round(wall_s, processor_s(stack, 0) - before[0], processor_s(stack, 1) - before[1])


def measure(model: Path, rounds: int, jobs: int) -> list[tuple[Round, Round]]:
    """Return the figures of each round without and with traces."""
    with ExitStack() as all_:
        collector = all_.enter_context(Collector())
        without = all_.enter_context(running(model))
        traced = all_.enter_context(running(model, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url))
        pairs = [(stack, all_.enter_context(stack.client())) for stack in (without, traced)]
        for stack, client in pairs:
            one_round(stack, client, CLIENTS)  # warms up
        found = []
        for number in range(rounds):
            order = pairs if number % 2 else pairs[::-1]
            figures = {stack: one_round(stack, client, jobs) for stack, client in order}
            found.append((figures[without], figures[traced]))
        return found


def main() -> int:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=4 * CLIENTS, help="per round (%(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()
    rounds = measure(options.model, options.rounds, options.jobs)
    for name in Round._fields:
        pairs = [(getattr(without, name), getattr(traced, name)) for without, traced in rounds]
        shown = ", ".join(f"{without:.2f}/{traced:.2f}" for without, traced in pairs)
        ratio = statistics.median(traced / without for without, traced in pairs)
        print(f"{name}: {ratio:.3f} times that without traces (median of the rounds: {shown})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
