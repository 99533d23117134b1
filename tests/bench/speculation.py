"""Speed with and without speculative decoding, for answers that repeat their prompts and for answers that do not.

The engine runs in process: `python -m tests.bench.speculation`, with `{"model": FOLDER, "rounds": …,
"tokens": …}` on standard input, measures one model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from shared.blas import prefer_openblas
from shared.jobs.request import Sampling
from tests.bench.in_process import SMOLLM2
from tests.bench.plans import Json
from tests.bench.processes import run_module
from tests.bench.prompts import question

if TYPE_CHECKING:
    from tests.bench.in_process import InProcess

_TOKENS: Final = {SMOLLM2: 80}
"""Tokens of each answer, by model."""
_DEFAULT_TOKENS: Final = 400
_WITHIN_S: Final = 3600.0
_TEXTS: Final = (
    "On Monday morning Anna walked down to the harbour, bought two loaves of bread and a newspaper, and waited there.",
    "The committee met twice in March, approved the budget for the library, and asked for a new drawing of the hall.",
    "Take a large bowl, mix the flour with the salt, add warm water slowly, and let the dough rest for one hour.",
    "The river rises in the northern hills, runs south past three old towns, and reaches the sea near a lighthouse.",
)

Turns = dict[str, list[dict[str, Any]]]
"""Case → figures of each turn."""


@dataclass(frozen=True, slots=True)
class Case:
    """Rows that decode together.

    Attributes:
        repeats: whether the answers repeat their prompts, so that draft tokens are often right.
    """

    rows: int
    repeats: bool
    temperature: float = 0.0

    @property
    def name(self) -> str:
        """The name in the table."""
        kind = "repeats its prompt" if self.repeats else "does not"
        return f"{kind}{', sampled' if self.temperature else ''}, {self.rows} row{'s' if self.rows > 1 else ''}"

    def messages(self, row: int, turn: int) -> list[Json]:
        """The prompt of a row, different in each turn."""
        if not self.repeats:
            return question(row + self.rows * turn)
        text = " ".join(_TEXTS[(row + turn + i) % len(_TEXTS)] for i in range(2))
        return [{"role": "user", "content": f"Repeat the following text word for word: {text}"}]


CASES: Final = (
    *(Case(rows, repeats=True) for rows in (1, 2, 4)),
    *(Case(rows, repeats=False) for rows in (1, 2, 4)),
    Case(1, repeats=False, temperature=1.0),
)


def speculation(tiny: Path, rounds: int) -> dict[str, Turns]:
    """Model → case → turns: the tiny model, and the default model if it is in the same folder; each in a process."""
    models = [model for model in (tiny.with_name(SMOLLM2), tiny) if model.exists()]
    return {model.name: _measure(model, rounds) for model in models}


def _measure(model: Path, rounds: int) -> Turns:
    tokens = _TOKENS.get(model.name, _DEFAULT_TOKENS)
    turns: Turns = run_module("speculation", {"model": str(model), "rounds": rounds, "tokens": tokens}, _WITHIN_S)
    return turns


def table(found: dict[str, Turns]) -> Table:
    """Medians over turns. On a busy machine the ratio of CPU time per token is more reliable than that of speed."""
    out = Table("model", "the answer …", title="speculative decoding, in process: tokens/s")
    for heading in ("without", "with", "ratio", "lowest", "highest", "CPU ratio", "drafted", "accepted", "same text"):
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


def compare(model: Path, rounds: int, tokens: int) -> Turns:
    """Measure every case with and without speculation, in alternating order."""
    from mlx_lm.utils import load_tokenizer

    from shared.settings import Settings
    from tests.bench.in_process import InProcess, load_runner

    draft_tokens = Settings(_env_file=None).speculation_tokens
    tokenizer = load_tokenizer(model)  # type: ignore[no-untyped-call]
    engines = {name: InProcess(load_runner(model, n)) for name, n in (("without", 0), ("with", draft_tokens))}
    turns: Turns = {case.name: [] for case in CASES}
    for turn in range(rounds):
        for case in CASES:
            before = engines["with"].runner.stats()
            order = ("without", "with") if turn % 2 else ("with", "without")
            figures = {name: _decode(engines[name], tokenizer, case, turn, tokens) for name in order}
            after = engines["with"].runner.stats()
            turns[case.name].append({
                **{name: each["tokens_per_s"] for name, each in figures.items()},
                "cpu_ratio": figures["with"]["cpu_ms"] / figures["without"]["cpu_ms"],
                "same": figures["with"]["tokens"] == figures["without"]["tokens"],
                **{key: after[f"speculation_{key}_tokens_total"] - before[f"speculation_{key}_tokens_total"]
                   for key in ("drafted", "accepted")},
            })  # fmt: skip
    return turns


def _decode(engine: InProcess, tokenizer: Any, case: Case, turn: int, max_tokens: int) -> dict[str, Any]:
    """Tokens per second and CPU time per token after the first token of each row, and the tokens of all rows."""
    rows = [
        engine.submit(
            tokenizer.apply_chat_template(case.messages(row, turn), add_generation_prompt=True),
            max_tokens,
            Sampling(case.temperature, seed=row),
            owner=f"turn {turn}",
        )
        for row in range(case.rows)
    ]
    while not all(row.generated or row.ending for row in rows):
        engine.step()
    start, start_cpu, before = time.perf_counter(), time.process_time(), sum(len(row.generated) for row in rows)
    while any(row.ending is None for row in rows):
        engine.step()
    took_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    tokens = sum(len(row.generated) for row in rows) - before
    return {"tokens_per_s": tokens / took_s, "cpu_ms": 1000 * cpu_s / tokens, "tokens": [row.generated for row in rows]}


if __name__ == "__main__":
    prefer_openblas()
    parameters = json.load(sys.stdin)
    print(json.dumps(compare(Path(parameters["model"]), parameters["rounds"], parameters["tokens"])))
