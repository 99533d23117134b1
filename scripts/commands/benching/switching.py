"""What switching between two warm models costs: steps of one alone, and of two in turns, in one process.

python -m scripts.commands.benching.switching, with `{"model": FOLDER, "rounds": …}` on standard input
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scripts.commands.benching.processes import asked
from shared.blas import prefer_openblas
from shared.jobs import Sampling

if TYPE_CHECKING:
    from worker.backends.text import TextBackend

ROWS: Final = 8
_PROMPT: Final = 64
_STEPS: Final = 120
"""Of each model in a turn; the first ones, in which prompts are read, do not count."""
_SETTLED: Final = 20


def switching(tiny: Path, rounds: int) -> dict[str, Any]:
    """Medians over all turns, measured in a process of its own: OpenBLAS must be there before MLX is."""
    found: dict[str, Any] = asked("switching", {"model": str(tiny), "rounds": rounds}, 600)
    return found


def line(found: dict[str, Any]) -> str:
    """The figures for people."""
    return (
        f"two warm models, {found['rows']} rows each: a step takes {found['alone_ms']:.2f} ms where one steps alone, "
        f"{found['in_turns_ms']:.2f} ms where they take turns: switching costs {found['cost']:+.0%} of a step; "
        f"memory peak {found['peak_mb']:.0f} MB"
    )


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """Steps of two models of this folder."""
    import mlx.core as mx

    from worker.backends.text import TextBackend, default_chunk
    from worker.models import load_model

    backends = [TextBackend(load_model(folder), default_chunk()) for _ in range(2)]
    for backend in backends:
        backend.warm()
    alone_s, in_turns_s = [], []
    for _ in range(rounds):
        alone_s += [_step_s([backend]) for backend in backends]
        in_turns_s.append(_step_s(backends))
    alone, in_turns = statistics.median(alone_s), statistics.median(in_turns_s)
    return {
        "rows": ROWS,
        "alone_ms": alone * 1000,
        "in_turns_ms": in_turns * 1000,
        "cost": in_turns / alone - 1,
        "peak_mb": mx.get_peak_memory() / 1e6,
    }


def _step_s(backends: Sequence[TextBackend]) -> float:
    """The median step, where these take turns."""
    from worker.backends.base import Row

    for backend in backends:
        prompts = [tuple(100 + (uid * 977 + i * 131) % 40_000 for i in range(_PROMPT)) for uid in range(ROWS)]
        backend.insert([Row(uid, prompt, 0, 10 * _STEPS, Sampling(0.0)) for uid, prompt in enumerate(prompts)])
    took_s = []
    for number in range(_STEPS):
        for backend in backends:
            start = time.perf_counter()
            backend.step()
            if number >= _SETTLED:
                took_s.append(time.perf_counter() - start)
    for backend in backends:
        backend.reset()
    return statistics.median(took_s)


if __name__ == "__main__":
    prefer_openblas()
    question = json.loads(sys.stdin.read())
    print(json.dumps(measured(Path(question["model"]), question["rounds"])))
