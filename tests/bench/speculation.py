"""What guessing tokens ahead gains and costs: answers that repeat their prompts, and answers that do not."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from scripts.model_files import default_model
from tests.bench.processes import asked

_TOKENS: Final = {default_model.NAME: 80}
"""Of each answer, by model."""
_MANY_TOKENS: Final = 400

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""Model → case → what each turn gave."""


def speculation(tiny: Path, rounds: int) -> Found:
    """The default model, where it lies beside the tiny one, and that, each in a process of its own."""
    models = [model for model in (tiny.with_name(default_model.NAME), tiny) if model.exists()]
    return {model.name: _compare(model, rounds) for model in models}


def _compare(model: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    question = {"model": str(model), "rounds": rounds, "tokens": _TOKENS.get(model.name, _MANY_TOKENS)}
    found: dict[str, list[dict[str, Any]]] = asked("guessing", question, 3600)
    return found


def table(found: Found) -> Table:
    """What people read: medians of the turns and of their ratios. CPU time a token tells more where others work too."""
    out = Table("model", "the answer …", title="tokens guessed ahead, in process: tokens/s")
    for heading in ("without", "with", "ratio", "lowest", "highest", "CPU ratio", "guessed", "right", "same text"):
        out.add_column(heading, justify="right")
    for model, cases in found.items():
        for name, turns in cases.items():
            ratios = [turn["with"] / turn["without"] for turn in turns]
            speeds = (f"{statistics.median(turn[way] for turn in turns):,.1f}" for way in ("without", "with"))
            spread = (f"{of(ratios):.2f}" for of in (statistics.median, min, max))
            cpu = f"{statistics.median(turn['cpu_ratio'] for turn in turns):.2f}"
            sums = (f"{sum(turn[what] for turn in turns):,.0f}" for what in ("drafted", "accepted"))
            same = f"{sum(turn['same'] for turn in turns)} of {len(turns)}"
            out.add_row(model, name, *speeds, *spread, cpu, *sums, same)
    return out
