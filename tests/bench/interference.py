"""How much a long prompt delays rows that decode: the duration of each engine step, measured in process.

`python -m tests.bench.interference MODEL_FOLDER REPEATS` measures one model.

Steps are measured in wall time and in CPU time of the process, which other processes on the machine disturb less.
Durations are multiples of the median quiet step of the same run. As many quiet steps are measured before the prompt as
after it, because contexts grow meanwhile and steps become slower.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.blas import prefer_openblas
from shared.settings import ROOT
from tests.bench.samples import quantile

if TYPE_CHECKING:
    from tests.bench.in_process import InProcess
    from worker.engine.sequence import Sequence as RunningSequence

ROWS, SHORT, LONG = 8, 24, 4000
"""Number of decoding rows, tokens of their prompts, tokens of the long prompt."""
_WARM, _QUIET, _AFTER = 20, 60, 10
"""Number of steps before the measurement, of each quiet period, and after the long row's first token and its end."""
_SLOWEST = 5
_MEGABYTE = 2**20

_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(slots=True)
class Step:
    """One step of the engine.

    Attributes:
        seconds: its duration by each clock.
        work: what it did in addition to decoding.
    """

    seconds: dict[str, float]
    work: str


@dataclass(slots=True)
class Bench:
    """An engine, and the steps that it has run."""

    engine: InProcess
    steps: list[Step] = field(default_factory=list)
    _rows: list[RunningSequence] = field(default_factory=list)
    _collected: list[int] = field(default_factory=list)
    _number: int = 0

    def insert(self, tokens: int) -> RunningSequence:
        """Add a row with a unique prompt."""
        self._number += 1
        prompt = [(self._number * 977 + i * 131) % 40_000 + 100 for i in range(tokens)]
        self._rows.append(self.engine.submit(prompt, 100_000))
        return self._rows[-1]

    def clear(self) -> None:
        """Remove all rows and prefixes."""
        self.engine.clear(self._rows)
        self._rows.clear()

    def run(self, steps: int) -> list[Step]:
        """Run this many steps."""
        return [self.step() for _ in range(steps)]

    def until(self, row: RunningSequence) -> list[Step]:
        """Run until this row has its first token."""
        first = len(self.steps)
        while not row.generated:
            self.step()
        return self.steps[first:]

    def step(self) -> Step:
        """Run the next step."""
        runner, totals = self.engine.runner, self.engine.core.totals
        before, prompt_tokens = runner.stats(), totals.prompt_tokens
        self._collected.clear()
        started = {name: clock() for name, clock in _CLOCKS.items()}
        self.engine.step()
        seconds = {name: clock() - started[name] for name, clock in _CLOCKS.items()}
        prefilled = totals.prompt_tokens - prompt_tokens
        parts = [f"{prefilled} tokens prefilled"] if prefilled else []
        parts += [f"gc {generation}" for generation in self._collected]
        after = runner.stats()
        for name, key in (("of prefixes", "prefix_cache_bytes"), ("of KV caches", "kv_bytes")):
            if (more := after[key] - before[key]) and abs(more) > _MEGABYTE / 10:
                parts.append(f"{more / _MEGABYTE:+.1f} MB {name}")
        self.steps.append(Step(seconds, ", ".join(parts) or "nothing else"))
        return self.steps[-1]

    @contextmanager
    def recording_collections(self) -> Iterator[None]:
        """Record garbage collections."""

        def record(phase: str, info: dict[str, int]) -> None:
            if phase == "stop":
                self._collected.append(info["generation"])

        gc.callbacks.append(record)
        try:
            yield
        finally:
            gc.callbacks.remove(record)


def once(bench: Bench) -> dict[str, Any]:
    """Measure the long prompt alone, then with rows that decode."""
    alone = bench.insert(LONG)
    figures: dict[str, Any] = {"alone_s": _seconds(bench.until(alone))}
    bench.clear()
    for _ in range(ROWS):
        bench.insert(SHORT)
    bench.run(_WARM)
    quiet = bench.run(_QUIET)
    long = bench.insert(LONG)
    prefill = bench.until(long)
    figures["among_s"] = _seconds(prefill)
    prefill += bench.run(_AFTER)
    bench.engine.stop([long])
    prefill += bench.run(_AFTER)
    later = bench.run(_QUIET)
    bench.clear()
    for clock in _CLOCKS:
        figures[clock] = ratios(*([step.seconds[clock] for step in steps] for steps in (quiet, prefill, later)))
    figures["slowest"] = [
        f"{1000 * step.seconds['wall']:.1f} ms: {step.work}; the step before: {before.work}"
        for before, step in sorted(
            zip([quiet[-1], *prefill], prefill, strict=False), key=lambda pair: -pair[1].seconds["wall"]
        )[:_SLOWEST]
    ]
    return figures


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds["wall"] for step in steps)


def ratios(before: Sequence[float], prefill: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Durations divided by the median quiet step: of quiet steps before and after, and of steps during the prefill."""
    median = statistics.median([*before, *after])
    return {
        "quiet_ms": 1000 * median,
        "before": statistics.median(before) / median,
        "after": statistics.median(after) / median,
        "quiet_p99": quantile([*before, *after], 0.99) / median,
        "p50": statistics.median(prefill) / median,
        "p99": quantile(prefill, 0.99) / median,
        "most": max(prefill) / median,
    }


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over runs; the slowest steps are those of the last run."""
    figures: dict[str, Any] = {"rows": ROWS, "long_tokens": LONG, "repeats": len(runs), "slowest": runs[-1]["slowest"]}
    for name in ("alone_s", "among_s"):
        figures[name] = statistics.median(run[name] for run in runs)
    for clock in _CLOCKS:
        figures[clock] = {key: statistics.median(run[clock][key] for run in runs) for key in runs[0][clock]}
    return figures


def interference(model: Path, repeats: int) -> dict[str, Any]:
    """Measure a model in another process, so that its memory is freed."""
    command = [sys.executable, "-m", "tests.bench.interference", str(model), str(repeats)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return {"model": model.name, **found}


def lines(figures: dict[str, Any]) -> str:
    """The figures for the terminal."""
    form = (
        "{model}: a prompt of {long_tokens} tokens with {rows} decoding rows, medians of {repeats}: "
        "first token after {among_s:.2f} s, {alone_s:.2f} s alone"
    )
    found = [form.format(**figures)]
    for clock in _CLOCKS:
        form = (
            "  {clock}: quiet step {quiet_ms:.2f} ms (before {before:.2f} x, after {after:.2f} x, "
            "p99 {quiet_p99:.2f} x), during prefill p50 {p50:.2f} x, p99 {p99:.2f} x, max {most:.2f} x"
        )
        found.append(form.format(clock=clock, **figures[clock]))
    return "\n".join([*found, *(f"  slowest: {each}" for each in figures["slowest"])])


def main() -> None:
    """Load the model, measure, print the figures as JSON."""
    prefer_openblas()
    from tests.bench.in_process import InProcess, load_runner

    folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
    bench = Bench(InProcess(load_runner(folder)))
    gc.collect()
    gc.freeze()
    with bench.recording_collections():
        runs = [once(bench) for _ in range(repeats)]
    print(json.dumps(medians(runs)))


if __name__ == "__main__":
    main()
