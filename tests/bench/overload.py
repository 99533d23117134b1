"""Times to the first token of interactive requests at half of the capacity, and at 120 % of it with a batch.

    python -m tests.bench.overload

The engine is the real one. The model is simulated, in virtual time (`tests.bench.batch_engine`). Requests arrive at
random times, whether or not earlier ones have ended. All have the same shape. The capacity is how many of them end per
second while all rows are always taken.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.jobs.record import Priority
from tests.bench.batch_engine import BATCH_TOKENS, DEVICES, PROMPT, Device, SimulatedRunner
from tests.bench.samples import quantile
from tests.plugins.work import claimed, sequence_for
from worker.engine.core import EngineCore
from worker.engine.sequence import Sequence
from worker.service.model_worker import SLOTS_PER_RESERVED_ROW

SLOTS_PER_SPARE_JOB: Final = 8
"""As `worker.queue.claimer`."""
WARM: Final = 100
"""Number of first requests that are not counted."""


@dataclass(slots=True)
class Figures:
    """What a load gave.

    Attributes:
        first_s: times from arrival to the first token of interactive requests, in seconds.
        ended: number of ended requests by class.
        seconds: virtual time that passed.
    """

    first_s: list[float] = field(default_factory=list)
    ended: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))
    seconds: float = 0.0


class OpenLoop:
    """Requests that arrive at given rates.

    Args:
        rates: mean number of arrivals per second, by class. Infinite: there is always a further one.
    """

    def __init__(self, device: Device, slots: int, reserve: int, rates: Mapping[Priority, float]) -> None:
        self._runner = SimulatedRunner(device)
        self._core = EngineCore(lambda: self._runner, slots, lambda _: None, reserve=reserve)
        self._core.load()
        self._random = random.Random(1)
        self._rates = rates
        self._spare = max(1, slots // SLOTS_PER_SPARE_JOB)
        self._next_at = {priority: self._interval(priority) for priority in rates}
        self._queues: dict[Priority, deque[float]] = {priority: deque() for priority in sorted(rates)}
        self._rows: list[tuple[Sequence, Priority, float, bool]] = []

    def run(self, requests: int) -> Figures:
        """Run until this many interactive requests have ended."""
        found, started = Figures(), 0.0
        while found.ended[Priority.NORMAL] < requests + WARM:
            self._arrive()
            self._claim()
            self._core.step()
            if not self._core.busy:
                self._runner.now = max(self._runner.now, min(self._next_at.values()))
            self._collect(found)
            if not started and found.ended[Priority.NORMAL] >= WARM:
                found, started = Figures(), self._runner.now
                requests -= WARM
        found.seconds = self._runner.now - started
        return found

    def _interval(self, priority: Priority) -> float:
        rate = self._rates[priority]
        return 0.0 if rate == float("inf") else self._random.expovariate(rate)

    def _arrive(self) -> None:
        for priority, queue in self._queues.items():
            if self._rates[priority] == float("inf"):
                queue.extend([self._runner.now] * (64 - len(queue)))
            while self._rates[priority] != float("inf") and self._next_at[priority] <= self._runner.now:
                queue.append(self._next_at[priority])
                self._next_at[priority] += self._interval(priority)

    def _claim(self) -> None:
        """Submit what a worker would claim: rows that are free, and interactive spare jobs."""
        for priority, queue in self._queues.items():
            while queue:
                capacity, waiting = self._core.capacity(), len(self._core.waiting())
                kept = capacity.reserve if priority is Priority.BATCH else 0
                if capacity.rows <= kept and (priority is Priority.BATCH or waiting >= self._spare):
                    break
                self._submit(priority, queue.popleft())

    def _submit(self, priority: Priority, arrived_at: float) -> None:
        prompt = "x" * self._random.randint(*PROMPT)
        job = claimed(
            prompt,
            max_tokens=self._random.randint(*BATCH_TOKENS),
            seed=self._random.random(),
            priority=priority,
            rank=priority * 1e6,
        )
        row = sequence_for(job, self._runner)
        self._core.submit(row)
        self._rows.append((row, priority, arrived_at, False))

    def _collect(self, found: Figures) -> None:
        now, rows = self._runner.now, []
        for row, priority, arrived_at, seen in self._rows:
            if row.generated and not seen and priority is Priority.NORMAL:
                found.first_s.append(now - arrived_at)
            if row.ending is None:
                rows.append((row, priority, arrived_at, bool(row.generated)))
            else:
                found.ended[priority] += 1
        self._rows = rows


def capacity(device: Device, slots: int, requests: int) -> float:
    """Return how many requests end per second while all rows are taken."""
    figures = OpenLoop(device, slots, 0, {Priority.NORMAL: float("inf")}).run(requests)
    return figures.ended[Priority.NORMAL] / figures.seconds


def loads(device: Device, slots: int, reserve: int, requests: int) -> tuple[Figures, Figures]:
    """Return the figures at 50 % of the capacity, and at 120 % of it, half of which are batch jobs."""
    full = capacity(device, slots, requests)
    half = OpenLoop(device, slots, reserve, {Priority.NORMAL: 0.5 * full}).run(requests)
    rates = {Priority.NORMAL: 0.6 * full, Priority.BATCH: 0.6 * full}
    return half, OpenLoop(device, slots, reserve, rates).run(requests)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="interactive requests of each load")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--reserve", type=int, nargs="+")
    options = parser.parse_args()
    reserves = options.reserve or [options.slots // SLOTS_PER_RESERVED_ROW]
    print("| device | reserve | TTFT p50, ms: 50 %, 120 % | p99, ms: 50 %, 120 % | ratio of p99 | batch jobs per s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, device in DEVICES.items():
        for reserve in reserves:
            both = loads(device, options.slots, reserve, options.requests)
            middle, high = ([quantile(each.first_s, share) * 1e3 for each in both] for share in (0.5, 0.99))
            cells = [name, reserve, *(f"{a:.0f}, {b:.0f}" for a, b in (middle, high)), f"{high[1] / high[0]:.2f}"]
            cells.append(f"{both[1].ended[Priority.BATCH] / both[1].seconds:.2f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
