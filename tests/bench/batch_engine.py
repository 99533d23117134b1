"""What a batch costs interactive rows in the engine: their times to the first token without and beside it.

    python -m tests.bench.batch_engine

The engine is the real one. The model is simulated: a step takes as long as on the device, and time is virtual. So the
figures do not depend on the machine, and show what the scheduler decides. Each client submits its next row some time
after the last one has ended. The batch refills every row that it may take.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shared.jobs.record import Priority
from tests.bench.samples import quantile
from tests.plugins.work import claimed, sequence_for
from worker.engine.core import EngineCore
from worker.engine.sequence import Sequence
from worker.runner.base import StepOutput, StepPlan
from worker.runner.cost import PrefillCost
from worker.runner.fake import FakeRunner

CLIENTS: Final = 4
TOKENS: Final = 12
PROMPT: Final = (20, 60)
"""Shortest and longest prompt, in tokens."""
BATCH_TOKENS: Final = (30, 90)
PAUSE_STEPS: Final = 20
"""Longest pause of a client, in decode steps of a single row."""
WARM_STEPS: Final = 100


@dataclass(frozen=True, slots=True)
class Device:
    """How long passes of a model take, in seconds.

    Attributes:
        decode_s, row_s: a decode step: its fixed part, and each row.
        prefill: a prefill pass.
        chunk: maximum tokens of a long prompt's chunk.
    """

    decode_s: float
    row_s: float
    prefill: PrefillCost
    chunk: int


DEVICES: Final[Mapping[str, Device]] = {
    "SmolLM2-135M float32, 2 CPU cores (measured)": Device(0.068, 0.0028, PrefillCost(0.02, 0.0049, 0.0), 128),
    "a model whose decode step is bound by memory": Device(0.020, 0.0002, PrefillCost(0.02, 0.0003, 0.0), 2048),
}


class SimulatedRunner(FakeRunner):
    """Counts the time that a device would take.

    Attributes:
        now: virtual time in seconds.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(chunk=device.chunk)
        self.cost = device.prefill
        self.now = 0.0
        self._device = device

    def execute(self, plan: StepPlan) -> StepOutput:
        """Generate tokens, and let the time of the step pass."""
        output = super().execute(plan)
        if output.tokens:
            self.now += self._device.decode_s + self._device.row_s * len(output.tokens)
        self.now += self._device.prefill.seconds(output.prompt_tokens, 0)
        return output


@dataclass(slots=True)
class Phase:
    """The figures of a phase, in seconds."""

    first_s: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    seconds: float = 0.0


class Load:
    """Clients, and possibly a batch, on one engine."""

    def __init__(self, device: Device, slots: int, reserve: int, *, batch: bool) -> None:
        self._runner = SimulatedRunner(device)
        self._core = EngineCore(lambda: self._runner, slots, lambda _: None, reserve=reserve)
        self._core.load()
        self._random = random.Random(1)
        self._waiting: list[tuple[Sequence, float]] = []
        self._clients: list[Sequence | None] = [None] * CLIENTS
        self._next_at = [0.0] * CLIENTS
        self._pause_s = PAUSE_STEPS * (device.decode_s + device.row_s)
        self._batch: list[Sequence] | None = [] if batch else None

    def run(self, requests: int) -> Phase:
        """Run until this many interactive requests have their first token."""
        for _ in range(WARM_STEPS):
            self._step(Phase())
        found, started = Phase(), self._runner.now
        while len(found.first_s) < requests:
            self._step(found)
        found.seconds = self._runner.now - started
        return found

    def _step(self, found: Phase) -> None:
        """Run a step. Rows that are submitted during it wait for its end."""
        before = sum(len(row.generated) for row in self._batch or ())
        self._core.step()
        if not self._core.busy:
            self._runner.now = min(self._next_at)
        now = self._runner.now
        found.batch_tokens += sum(len(row.generated) for row in self._batch or ()) - before
        found.first_s += [now - since for row, since in self._waiting if row.generated]
        self._waiting = [each for each in self._waiting if not each[0].generated]
        self._fill(now)

    def _fill(self, now: float) -> None:
        """Submit the rows of clients whose pause is over, and rows of the batch as a claim would."""
        for number, last in enumerate(self._clients):
            if last is not None and last.ending is not None:
                self._clients[number] = None
                self._next_at[number] = now + self._random.uniform(0, self._pause_s)
            if self._clients[number] is None and self._next_at[number] <= now:
                self._clients[number] = row = self._submit(TOKENS, Priority.NORMAL)
                self._waiting.append((row, self._next_at[number]))
        if self._batch is not None:
            self._batch = [row for row in self._batch if row.ending is None]
            while (capacity := self._core.capacity()).rows > capacity.reserve:
                self._batch.append(self._submit(self._random.randint(*BATCH_TOKENS), Priority.BATCH))

    def _submit(self, max_tokens: int, priority: Priority) -> Sequence:
        prompt = "x" * self._random.randint(*PROMPT)
        job = claimed(prompt, max_tokens=max_tokens, seed=self._random.random(), priority=priority, rank=priority * 1e6)
        row = sequence_for(job, self._runner)
        self._core.submit(row)
        return row


def ratio(alone: Phase, beside: Phase, share: float) -> float:
    """Return a quantile of the times to the first token beside the batch, relative to the one without it."""
    return quantile(beside.first_s, share) / quantile(alone.first_s, share)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="interactive requests of each phase")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--reserve", type=int, nargs="+", default=[0, 2, 4, 8, 16])
    options = parser.parse_args()
    print(
        "| device | reserve | TTFT p50, ms: alone, beside | p99, ms: alone, beside | ratio of p99 | batch, tokens/s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, device in DEVICES.items():
        alone = Load(device, options.slots, 0, batch=False).run(options.requests)
        for reserve in options.reserve:
            beside = Load(device, options.slots, reserve, batch=True).run(options.requests)
            halves, high = ([quantile(each.first_s, share) * 1e3 for each in (alone, beside)] for share in (0.5, 0.99))
            cells = [name, reserve, *(f"{a:.0f}, {b:.0f}" for a, b in (halves, high))]
            cells += [f"{ratio(alone, beside, 0.99):.2f}", f"{beside.batch_tokens / beside.seconds:.0f}"]
            print(f"| {' | '.join(map(str, cells))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
