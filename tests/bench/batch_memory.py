"""A large batch beside interactive clients: the memory of each process, and the time to the first token.

    python -m tests.bench.batch_memory --lines 10000 --out FOLDER

It starts an API, a background process and a worker with the fake backend, whose steps take 10 ms, and writes
`batch-memory.json` and `batch-memory.svg`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import openai
import psutil
from matplotlib import style
from matplotlib.figure import Figure

from scripts.client.api import Client
from tests.bench.charts import STYLE
from tests.plugins.stack import Stack, made_stack

PAUSE: Final = "!pause=0.01"
TOKENS: Final = 12
CLIENTS: Final = 4
ALONE_S: Final = 20.0
SAMPLE_S: Final = 0.5


@dataclass
class Figures:
    """What was measured.

    Attributes:
        memory: (completed lines, bytes) of each process, by name, over time.
        alone, beside: times to the first token of interactive requests in seconds, without and beside the batch.
        batch_s: how long the batch took.
    """

    lines: int
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    batch_s: float = 0.0

    def growth(self, start: int) -> dict[str, float]:
        """Return by how many MB each process has grown since a number of lines was completed."""
        growth = {}
        for name, samples in self.memory.items():
            first = next((size for done, size in samples if done >= start), samples[-1][1])
            growth[name] = (samples[-1][1] - first) / 2**20
        return growth


def p99(times: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(times, n=100)[98]


def measure(lines: int) -> Figures:
    """Run a batch of this many lines."""
    figures = Figures(lines)
    for stack in made_stack(Path("fake"), {"BACKEND": "fake", "RETENTION_S": "30"}):
        web = stack.start_web()
        worker = stack.start_worker()
        background = stack.start_background()
        processes = _processes({"web": web.pid, "worker": worker.pid, "background": background.pid}, stack)
        figures.alone = _interactive(stack, lambda started: time.monotonic() - started > ALONE_S)
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key) as client:
            file = client.files.create(file=("in.jsonl", _content(lines)), purpose="batch")
            started = time.monotonic()
            batch = client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            ended = threading.Event()
            clients = threading.Thread(target=_beside, args=(stack, ended, figures.beside))
            clients.start()
            try:
                _watch(client, batch.id, processes, figures)
            finally:
                ended.set()
                clients.join()
            figures.batch_s = time.monotonic() - started
    return figures


def _watch(client: openai.OpenAI, batch_id: str, processes: Mapping[str, psutil.Process], figures: Figures) -> None:
    """Sample the memory until the batch has ended."""
    while True:
        batch = client.batches.retrieve(batch_id)
        done = batch.request_counts.completed if batch.request_counts else 0
        for name, process in processes.items():
            figures.memory.setdefault(name, []).append((done, _memory(process)))
        if batch.status not in ("validating", "in_progress", "finalizing"):
            if batch.status != "completed" or done != figures.lines:
                raise RuntimeError(f"the batch ended as {batch.status} after {done} lines")
            return
        time.sleep(SAMPLE_S)


def _processes(pids: Mapping[str, int], stack: Stack) -> dict[str, psutil.Process]:
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    children = psutil.Process().children(recursive=True)
    home = str(stack.home)
    queue = [each for each in children if "valkey" in each.name() and home in " ".join(each.cmdline())]
    return {**processes, **({"valkey": queue[0]} if queue else {})}


def _memory(process: psutil.Process) -> int:
    return sum(int(each.memory_info().rss) for each in (process, *process.children(recursive=True)))


def _interactive(stack: Stack, over: Any) -> list[float]:
    """Send interactive requests from a few clients; return their times to the first token."""
    times: list[float] = []
    started = time.monotonic()

    def work() -> None:
        with Client(stack.url, stack.key) as client:
            while not over(started):
                times.append(_first_token_s(client))

    clients = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return times


def _beside(stack: Stack, ended: threading.Event, times: list[float]) -> None:
    """Measure interactive requests until the batch has ended."""
    times += _interactive(stack, lambda _: ended.is_set())


def _first_token_s(client: Client) -> float:
    body = {"prompt": f"{PAUSE} hello", "max_tokens": TOKENS, "stream": True}
    started = time.monotonic()
    first = 0.0
    with client.stream("POST", "/inference", json=body, headers={"Accept": "text/event-stream"}) as response:
        for line in response.iter_lines():
            if not first and line.startswith("event: chunk"):
                first = time.monotonic() - started
    return first


def _content(lines: int) -> bytes:
    def line(n: int) -> bytes:
        body = {"messages": [{"role": "user", "content": f"{PAUSE} line {n}"}], "max_tokens": TOKENS}
        request = {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(request).encode() + b"\n"

    return b"".join(map(line, range(lines)))


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
    print(f"TTFT p50 / p99, ms: alone {_summary(figures.alone)}, beside the batch {_summary(figures.beside)}")
    return 0


def _summary(times: Sequence[float]) -> str:
    return f"{statistics.median(times) * 1e3:.1f} / {p99(times) * 1e3:.1f} ({len(times)} requests)"


if __name__ == "__main__":
    sys.exit(main())
