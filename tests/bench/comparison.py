"""An earlier checkout and the present one, measured in turns (A B, A B, …).

The load generator is the present checkout's for both; in-process figures come from each checkout's own module.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from shared.settings import ROOT
from tests.bench import path
from tests.bench.checkouts import Checkout
from tests.bench.contenders import own_stack
from tests.bench.modelless import modelless
from tests.bench.plans import ChatRequest, closed
from tests.bench.processes import NotUp
from tests.bench.prompts import question
from tests.bench.samples import figures

BEFORE, NOW = "before", "now"
_SLOTS: Final = 64
_WARM_TOKENS: Final = 8
_MODULE_S: Final = 600.0


Measure = Callable[[Checkout, Path], Iterator[tuple[str, float]]]
"""Measures a checkout, given the folder of the models' folders; yields names and values of figures."""


@dataclass(frozen=True, slots=True)
class Load:
    """Bursts of clients with one request each.

    Attributes:
        bursts: repetitions for each number of clients; the median counts.
    """

    model: str
    tokens: int
    clients: tuple[int, ...]
    bursts: int

    def measure(self, checkout: Checkout, models: Path) -> Iterator[tuple[str, float]]:
        """Tokens/s and TTFT p99 by clients."""
        numbers = count()

        def request(tokens: int) -> ChatRequest:
            return ChatRequest(question(next(numbers)), tokens)

        with own_stack(models / self.model, _SLOTS, checkout=checkout) as stack:
            stack.run(closed([[request(_WARM_TOKENS)] for _ in range(2)]))
            for clients in self.clients:
                plans = (closed([[request(self.tokens)] for _ in range(clients)]) for _ in range(self.bursts))
                bursts = [figures(found.samples, found.wall_s) for found in map(stack.run, plans)]
                name = f"{self.model}, {clients} client{'s' if clients > 1 else ''}"
                for figure, unit in (("tokens_per_s", "tok/s"), ("ttft_p99_s", "TTFT p99 s"), ("failed", "failed")):
                    yield f"{name}: {unit}", statistics.median(each[figure] for each in bursts)


def _interference(checkout: Checkout, models: Path) -> Iterator[tuple[str, float]]:
    found = checkout.module_output("interference", [str(models / "tiny-random-llama"), "3"], _MODULE_S)
    for name in ("p50", "p99", "most"):
        yield f"interference, in process: step {name} over the quiet median", found["wall"][name]
    yield "interference, in process: quiet step ms", found["wall"]["quiet_ms"]
    yield "interference, in process: s to the long prompt's first token", found["among_s"]


def _pipeline(case: str) -> Measure:
    def measure(checkout: Checkout, _: Path) -> Iterator[tuple[str, float]]:
        with modelless(checkout=checkout, SLOTS="1024") as stack:
            found = path.CASES[case].run(stack)
        for name, unit in (("tokens_per_s", "tok/s"), ("delay_p50_ms", "p50 ms"), ("delay_p99_ms", "p99 ms")):
            yield f"pipeline, {case}: {unit}", found[name]
        yield f"pipeline, {case}: CPU ms per 1,000 tokens", sum(_own_cpu(found["cpu_ms_per_1000_tokens"]))

    return measure


def _submit(checkout: Checkout, _: Path) -> Iterator[tuple[str, float]]:
    for case, (found,) in path.submits(1, checkout).items():
        for name, unit in (("jobs_per_s", "jobs/s"), ("p99_ms", "p99 ms")):
            yield f"submit, {case}: {unit}", found[name]
        yield f"submit, {case}: CPU ms per job", sum(_own_cpu(found["cpu_ms_per_job"]))


def _own_cpu(by_process: dict[str, float]) -> Iterator[float]:
    return (used for name, used in by_process.items() if name != "client")


TURNS: Final[dict[str, Measure]] = {
    "tiny": Load("tiny-random-llama", 128, (1, 8, 32, 64), bursts=3).measure,
    "smollm2": Load("SmolLM2-135M-Instruct", 48, (1, 8, 32), bursts=1).measure,
    "interference": _interference,
    **{f"pipeline, {case}": _pipeline(case) for case in path.CASES},
    "submit": _submit,
}


def compare(
    before: Path, rounds: int, models: Path, turns: Mapping[str, Measure] = TURNS, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Measure both checkouts in turns, `rounds` times. A turn that fails is recorded, and the run continues.

    Args:
        models: folder with the models' folders; both checkouts serve the same files.
        say: prints a line of progress.
    """
    checkouts = {BEFORE: Checkout(before), NOW: Checkout(ROOT)}
    found: dict[str, dict[str, dict[int, float]]] = {}
    loads, failed, start = [], [], time.monotonic()
    for number, (name, measure), side in product(range(rounds), turns.items(), checkouts):
        loads.append(os.getloadavg()[0])
        turn = f"round {number + 1}, {name}, {side}"
        say(f"{time.monotonic() - start:5.0f} s: {turn}")
        try:
            for figure, value in measure(checkouts[side], models):
                found.setdefault(figure, {BEFORE: {}, NOW: {}})[side][number] = value
        except (NotUp, RuntimeError) as error:
            failed.append(f"{turn}: {_reason(error)}")
            say(f"FAILED: {failed[-1]}")
    return {
        "commits": {side: checkout.commit for side, checkout in checkouts.items()},
        "rounds": rounds,
        "figures": found,
        "failed": failed,
        "loads": loads,
        "seconds": time.monotonic() - start,
    }


def _reason(error: Exception) -> str:
    """The last line of an error, or of the log that it has."""
    text = f"{error}\n{error.log}" if isinstance(error, NotUp) else str(error)
    return text.strip().splitlines()[-1] if text.strip() else type(error).__name__


def table(results: dict[str, Any]) -> Table:
    """The figures for the terminal: medians, and the ratios of the two turns of each round."""
    commits, loads = results["commits"], results["loads"]
    out = Table(
        "figure",
        title=f"medians of {results['rounds']} rounds in turns, {results['seconds']:.0f} s, "
        f"load average {min(loads):.1f} to {max(loads):.1f}",
        caption="\n".join(f"FAILED: {each}" for each in results["failed"]) or None,
    )
    for heading in (f"before {commits[BEFORE]}", f"now {commits[NOW]}", "now / before", "range"):
        out.add_column(heading, justify="right")
    for figure, sides in results["figures"].items():
        out.add_row(figure, *(_median(sides[side]) for side in (BEFORE, NOW)), *_ratios(sides[BEFORE], sides[NOW]))
    return out


def _median(by_round: Mapping[int, float]) -> str:
    return f"{statistics.median(by_round.values()):,.2f}" if by_round else ""


def _ratios(before: Mapping[int, float], now: Mapping[int, float]) -> tuple[str, str]:
    """Median and range of the ratios, over the rounds that both checkouts have."""
    ratios = sorted(now[number] / before[number] for number in before.keys() & now.keys() if before[number])
    return (f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}") if ratios else ("", "")
