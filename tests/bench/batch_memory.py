"""A large batch beside interactive clients: the memory of each process.

    python -m tests.bench.batch_memory --lines 10000 --out FOLDER

It starts an API, a background process and a worker with the fake backend, whose steps take 10 ms, and writes
`batch-memory.json` and `batch-memory.svg`.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import openai
import psutil
from matplotlib import style
from matplotlib.figure import Figure

from tests.bench.batch_latency import CLIENTS, FAKE, PAUSE, UNFINISHED, batch_stack, interactive, start_batch
from tests.bench.charts import STYLE
from tests.plugins.stack import Stack

TOKENS: Final = 12
SAMPLE_S: Final = 0.5


@dataclass
class Figures:
    """What was measured.

    Attributes:
        memory: (completed lines, bytes) of each process, by name, over time.
        requests: number of interactive requests that ended meanwhile.
        batch_s: how long the batch took.
    """

    lines: int
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    requests: int = 0
    batch_s: float = 0.0

    def growth(self, start: int) -> dict[str, float]:
        """Return by how many MB each process has grown since a number of lines was completed."""
        growth = {}
        for name, samples in self.memory.items():
            first = next((size for done, size in samples if done >= start), samples[-1][1])
            growth[name] = (samples[-1][1] - first) / 2**20
        return growth


def measure(lines: int) -> Figures:
    """Run a batch of this many lines."""
    figures = Figures(lines)
    with batch_stack(FAKE) as stack, openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key) as client:
        started, ended = time.monotonic(), threading.Event()
        batch_id = start_batch(stack, client, lines, PAUSE, TOKENS)
        requests = threading.Thread(target=_interactive, args=(stack, ended, figures))
        requests.start()
        try:
            _watch(client, batch_id, _processes(stack), figures)
        finally:
            ended.set()
            requests.join()
        figures.batch_s = time.monotonic() - started
    return figures


def _interactive(stack: Stack, ended: threading.Event, figures: Figures) -> None:
    figures.requests = len(interactive(stack, PAUSE, TOKENS, ended.is_set))


def _watch(client: openai.OpenAI, batch_id: str, processes: Mapping[str, psutil.Process], figures: Figures) -> None:
    """Sample the memory until the batch has ended."""
    while True:
        batch = client.batches.retrieve(batch_id)
        done = batch.request_counts.completed if batch.request_counts else 0
        for name, process in processes.items():
            figures.memory.setdefault(name, []).append((done, _memory(process)))
        if batch.status not in UNFINISHED:
            if batch.status != "completed" or done != figures.lines:
                failed = client.files.content(batch.error_file_id).text[:2000] if batch.error_file_id else ""
                raise RuntimeError(f"the batch ended as {batch.status} after {done} lines: {failed}")
            return
        time.sleep(SAMPLE_S)


def _processes(stack: Stack) -> dict[str, psutil.Process]:
    started = zip(("web", "worker", "background"), stack.processes, strict=True)
    processes = {name: psutil.Process(process.pid) for name, process in started}
    home = str(stack.home)
    children = psutil.Process().children(recursive=True)
    queue = [each for each in children if "valkey" in each.name() and home in " ".join(each.cmdline())]
    return {**processes, **({"valkey": queue[0]} if queue else {})}


def _memory(process: psutil.Process) -> int:
    """Return the resident memory of a process and its children, except the copies of itself that Valkey forks."""
    children = [] if "valkey" in process.name() else process.children(recursive=True)
    return sum(int(each.memory_info().rss) for each in (process, *children))


def draw(figures: Figures) -> Figure:
    """Draw the memory of each process by completed lines."""
    with style.context(STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for name, samples in figures.memory.items():
            axes.plot([done for done, _ in samples], [size / 2**20 for _, size in samples], label=name)
        axes.set(xlabel="completed lines", ylabel="resident memory, MiB", ylim=(0, None))
        axes.set_title(f"A batch of {figures.lines:,} lines beside {CLIENTS} interactive clients")
        axes.legend()
    return figure


def main() -> int:
    """Measure, write the files, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figures = measure(options.lines)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "batch-memory.json").write_text(json.dumps(asdict(figures)))
    draw(figures).savefig(options.out / "batch-memory.svg", metadata={"Date": None})
    print(f"{figures.lines} lines in {figures.batch_s:.0f} s")
    print(
        "growth after a tenth, MB:",
        {name: round(size, 1) for name, size in figures.growth(options.lines // 10).items()},
    )
    print(f"{figures.requests} interactive requests meanwhile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
