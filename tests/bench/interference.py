"""What a long prompt does to rows that decode: the time between their tokens, in process, step by step.

python -m tests.bench.interference MODEL_FOLDER REPEATS

By the clock, and in the CPU time of the process, which others on the machine disturb less (the threads of a BLAS that
wait for each other count in both). All in quiet times of the same run: the median step without a prompt is 1. As many
of those are before as after it, for the rows grow meanwhile, and their steps with them.
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
"""Rows that decode, tokens of their prompts, and of the long one."""
_WARM, _QUIET, _AFTER = 20, 60, 10
"""Steps before anything is measured, in quiet, and after the long row's first token and its end."""
_SLOWEST = 5
_MEGABYTE = 2**20

_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(slots=True)
class Step:
    """One step of the engine: how long by each clock, and what it did beside decoding."""

    seconds: dict[str, float]
    what: str


@dataclass(slots=True)
class Bench:
    """An engine that is stepped, and the steps so far."""

    engine: InProcess
    steps: list[Step] = field(default_factory=list)
    _rows: list[RunningSequence] = field(default_factory=list)
    _collected: list[int] = field(default_factory=list)
    _number: int = 0

    def insert(self, tokens: int) -> RunningSequence:
        """A row with a prompt like no other."""
        self._number += 1
        prompt = [(self._number * 977 + i * 131) % 40_000 + 100 for i in range(tokens)]
        self._rows.append(self.engine.submit(prompt, 100_000))
        return self._rows[-1]

    def clear(self) -> None:
        """Remove all rows and prefixes."""
        self.engine.clear(self._rows)
        self._rows.clear()

    def run(self, steps: int) -> list[Step]:
        """So many steps."""
        return [self.step() for _ in range(steps)]

    def until(self, row: RunningSequence) -> list[Step]:
        """Steps until this row has its first token."""
        begun = len(self.steps)
        while not row.generated:
            self.step()
        return self.steps[begun:]

    def step(self) -> Step:
        """The next one."""
        runner, totals = self.engine.runner, self.engine.core.totals
        before, prompt_tokens = runner.stats(), totals.prompt_tokens
        self._collected.clear()
        begun = {name: clock() for name, clock in _CLOCKS.items()}
        self.engine.step()
        seconds = {name: clock() - begun[name] for name, clock in _CLOCKS.items()}
        prefilled = totals.prompt_tokens - prompt_tokens
        parts = [f"{prefilled} tokens prefilled"] if prefilled else []
        parts += [f"gc {generation}" for generation in self._collected]
        after = runner.stats()
        for name, key in (("of prefixes", "prefix_cache_bytes"), ("of caches", "kv_bytes")):
            if (more := after[key] - before[key]) and abs(more) > _MEGABYTE / 10:
                parts.append(f"{more / _MEGABYTE:+.1f} MB {name}")
        self.steps.append(Step(seconds, ", ".join(parts) or "nothing else"))
        return self.steps[-1]

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note garbage collections."""

        def note(phase: str, info: dict[str, int]) -> None:
            if phase == "stop":
                self._collected.append(info["generation"])

        gc.callbacks.append(note)
        try:
            yield
        finally:
            gc.callbacks.remove(note)


def once(bench: Bench) -> dict[str, Any]:
    """The long prompt alone, then among rows that decode."""
    alone = bench.insert(LONG)
    figures: dict[str, Any] = {"alone_s": _seconds(bench.until(alone))}
    bench.clear()
    for _ in range(ROWS):
        bench.insert(SHORT)
    bench.run(_WARM)
    quiet = bench.run(_QUIET)
    long = bench.insert(LONG)
    reading = bench.until(long)
    figures["among_s"] = _seconds(reading)
    reading += bench.run(_AFTER)
    bench.engine.stop([long])
    reading += bench.run(_AFTER)
    later = bench.run(_QUIET)
    bench.clear()
    for clock in _CLOCKS:
        figures[clock] = ratios(*([step.seconds[clock] for step in steps] for steps in (quiet, reading, later)))
    figures["slowest"] = [
        f"{1000 * step.seconds['wall']:.1f} ms: {step.what}; before it: {before.what}"
        for before, step in sorted(
            zip([quiet[-1], *reading], reading, strict=False), key=lambda pair: -pair[1].seconds["wall"]
        )[:_SLOWEST]
    ]
    return figures


def _seconds(steps: Sequence[Step]) -> float:
    return sum(step.seconds["wall"] for step in steps)


def ratios(before: Sequence[float], reading: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """The steps' times over the quiet median."""
    median = statistics.median([*before, *after])
    return {
        "quiet_ms": 1000 * median,
        "before": statistics.median(before) / median,
        "after": statistics.median(after) / median,
        "quiet_p99": quantile([*before, *after], 0.99) / median,
        "p50": statistics.median(reading) / median,
        "p99": quantile(reading, 0.99) / median,
        "most": max(reading) / median,
    }


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure; the slowest steps are those of the last run."""
    figures: dict[str, Any] = {"rows": ROWS, "long_tokens": LONG, "repeats": len(runs), "slowest": runs[-1]["slowest"]}
    for name in ("alone_s", "among_s"):
        figures[name] = statistics.median(run[name] for run in runs)
    for clock in _CLOCKS:
        figures[clock] = {key: statistics.median(run[clock][key] for run in runs) for key in runs[0][clock]}
    return figures


def interference(model: Path, repeats: int) -> dict[str, Any]:
    """All of it, in a process of its own, which gives the memory back."""
    command = [sys.executable, "-m", "tests.bench.interference", str(model), str(repeats)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return {"model": model.name, **found}


def lines(figures: dict[str, Any]) -> str:
    """For people."""
    form = (
        "{model}: a prompt of {long_tokens} tokens among {rows} rows, medians of {repeats}: "
        "first token after {among_s:.2f} s, {alone_s:.2f} s alone"
    )
    said = [form.format(**figures)]
    for clock in _CLOCKS:
        form = (
            "  {clock}: step in quiet {quiet_ms:.2f} ms (before {before:.2f} x, after {after:.2f} x, "
            "p99 {quiet_p99:.2f} x), while it comes p50 {p50:.2f} x, p99 {p99:.2f} x, at most {most:.2f} x"
        )
        said.append(form.format(clock=clock, **figures[clock]))
    return "\n".join([*said, *(f"  slowest, {each}" for each in figures["slowest"])])


def main() -> None:
    """Load the model, measure, print it as JSON."""
    prefer_openblas()
    from tests.bench.in_process import InProcess, load_runner

    folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
    bench = Bench(InProcess(load_runner(folder)))
    gc.collect()
    gc.freeze()
    with bench.heard():
        runs = [once(bench) for _ in range(repeats)]
    print(json.dumps(medians(runs)))


if __name__ == "__main__":
    main()
