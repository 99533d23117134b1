"""The cost of switching between two warm models: steps of one engine thread with one model, and with two.

The engine runs in process: `python -m tests.bench.switching`, with `{"model": FOLDER, "rounds": …}` on
standard input.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.blas import prefer_openblas
from tests.bench.processes import run_module

if TYPE_CHECKING:
    from worker.runner.model_runner import MLXRunner

ROWS: Final = 8
_PROMPT_TOKENS: Final = 64
_STEPS: Final = 120
"""Steps of each model in a turn."""
_SETTLED: Final = 20
"""The first steps prefill the prompts and do not count."""


def switching(tiny: Path, rounds: int) -> dict[str, Any]:
    """Medians over all turns, measured in another process: OpenBLAS must be loaded before MLX."""
    found: dict[str, Any] = run_module("switching", {"model": str(tiny), "rounds": rounds}, 600)
    return found


def line(found: dict[str, Any]) -> str:
    """The figures for the terminal."""
    return (
        f"two warm models, {found['rows']} rows each: a step takes {found['alone_ms']:.2f} ms with one model and "
        f"{found['in_turns_ms']:.2f} ms when two alternate: switching costs {found['cost']:+.0%} of a step; "
        f"memory peak {found['peak_mb']:.0f} MB"
    )


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure an engine that loads the model of this folder twice."""
    import mlx.core as mx

    from tests.bench.in_process import load_runner

    runners = [load_runner(folder) for _ in range(2)]
    for runner in runners:
        runner.eos = frozenset()  # no row ends early
    alone_s, in_turns_s = [], []
    for _ in range(rounds):
        alone_s += [_turn_s([runner]) for runner in runners]
        in_turns_s.append(_turn_s(runners))
    alone, in_turns = statistics.median(alone_s), statistics.median(in_turns_s)
    return {
        "rows": ROWS,
        "alone_ms": alone * 1000,
        "in_turns_ms": in_turns * 1000,
        "cost": in_turns / alone - 1,
        "peak_mb": mx.get_peak_memory() / 1e6,
    }


def _turn_s(runners: Sequence[MLXRunner]) -> float:
    """Median seconds of one step of an engine thread that has these models."""
    from tests.bench.in_process import InProcess
    from worker.engine.engine import EngineThread

    engine = EngineThread()
    for runner in runners:
        model = InProcess(runner, load=False)
        engine.load(model.core)
        engine.turn()
        for row in range(ROWS):
            model.submit([100 + (row * 977 + i * 131) % 40_000 for i in range(_PROMPT_TOKENS)], 10 * _STEPS)
    took_s = []
    for number in range(_STEPS * len(runners)):
        start = time.perf_counter()
        engine.turn()
        if number >= _SETTLED * len(runners):
            took_s.append(time.perf_counter() - start)
    for runner in runners:
        runner.reset()
    return statistics.median(took_s)


if __name__ == "__main__":
    prefer_openblas()
    parameters = json.load(sys.stdin)
    print(json.dumps(measured(Path(parameters["model"]), parameters["rounds"])))
