"""Speed of rows with constraints, log-probabilities or a logit bias, relative to the speed of free rows.

The engine runs in process: `python -m tests.bench.constrained`, with `{"model": FOLDER, "rounds": …, "rows": …,
"tokens": …}` on standard input, measures one model. No row ends while it is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from shared.blas import prefer_openblas
from shared.jobs.request import Constraint, Request
from tests.bench.in_process import GREEDY, SMOLLM2, InProcess, load_runner
from tests.bench.processes import run_module
from tests.bench.prompts import question

if TYPE_CHECKING:
    from worker.engine.sequence import Sequence

ROWS: Final = 32
_STEPS: Final = {SMOLLM2: 30}
"""Steps per measurement, by model."""
_DEFAULT_STEPS: Final = 200
MAX_TOKENS: Final = 2000
_WITHIN_S: Final = 3600.0
_ITEM: Final = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
_SCHEMA: Final = {"type": "array", "items": _ITEM, "minItems": 1000}
"""No answer of the bench is long enough to satisfy it, so none ends early."""

Turns = dict[str, list[dict[str, float]]]
"""Case → figures of each turn."""


@dataclass(frozen=True, slots=True)
class Case:
    """What the rows of a batch request.

    Attributes:
        share: the rows that do so; the others are free.
    """

    name: str
    constraint: Constraint | None = None
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    share: float = 1.0

    def request(self, row: int, model: str, max_tokens: int) -> Request:
        """The request of a row."""
        if row % 2 >= 2 * self.share:
            return Request(model, max_tokens, GREEDY)
        options: dict[str, Any] = {"constraint": self.constraint, "logit_bias": self.logit_bias}
        return Request(model, max_tokens, GREEDY, logprobs=self.logprobs, **options)


_CONSTRAINT: Final = Constraint("json_schema", json.dumps(_SCHEMA))
FREE: Final = Case("free")
CASES: Final = (
    FREE,
    Case("all constrained", _CONSTRAINT),
    Case("half constrained", _CONSTRAINT, share=0.5),
    Case("log-probabilities", logprobs=0),
    Case("with 5 alternatives", logprobs=5),
    Case("logit bias", logit_bias=((100, -5.0), (200, 1.0))),
)


def constrained(tiny: Path, rounds: int) -> dict[str, Turns]:
    """Measure the cases with each model; see `in_each_model`."""
    return in_each_model("constrained", tiny, rounds)


def in_each_model(module: str, tiny: Path, rounds: int) -> dict[str, Turns]:
    """Model → case → turns: the tiny model, and the default model if it is in the same folder; each in a process.

    Args:
        module: the module of the bench that measures a model.
    """
    models = [model for model in (tiny.with_name(SMOLLM2), tiny) if model.exists()]
    found: dict[str, Turns] = {}
    for model in models:
        steps = _STEPS.get(model.name, _DEFAULT_STEPS)
        given = {"model": str(model), "rounds": rounds, "rows": ROWS, "tokens": steps}
        found[model.name] = run_module(module, given, _WITHIN_S)
    return found


def table(found: dict[str, Turns]) -> Table:
    """The figures relative to free rows."""
    return relative_table(found, FREE.name, f"{ROWS} rows, in process: tokens/s relative to free rows")


def relative_table(found: dict[str, Turns], base: str, title: str) -> Table:
    """Medians over turns. On a busy machine the ratio of CPU time per token is more reliable than that of speed.

    Args:
        base: the case to which the others are compared.
    """
    out = Table("model", "rows", title=title)
    for heading in ("tokens/s", "ratio", "lowest", "highest", "CPU ms per token", "CPU ratio"):
        out.add_column(heading, justify="right")
    for model, cases in found.items():
        for name, turns in cases.items():
            pairs = list(zip(turns, cases[base], strict=True))
            ratios = [turn["tokens_per_s"] / other["tokens_per_s"] for turn, other in pairs]
            cpu = [turn["cpu_ms"] / other["cpu_ms"] for turn, other in pairs]
            out.add_row(
                model,
                name,
                f"{statistics.median(turn['tokens_per_s'] for turn in turns):,.1f}",
                *(f"{of(ratios):.2f}" for of in (statistics.median, min, max)),
                f"{statistics.median(turn['cpu_ms'] for turn in turns):.3f}",
                f"{statistics.median(cpu):.2f}",
            )
    return out


def compare(model: Path, rounds: int, rows: int, tokens: int) -> Turns:
    """Measure every case in turns, in alternating order."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(model)  # type: ignore[no-untyped-call]
    runner = load_runner(model)
    runner.eos = frozenset()  # for the engine; constraints know the end tokens
    engine = InProcess(runner)
    turns: Turns = {case.name: [] for case in CASES}
    for turn in range(rounds):
        for case in CASES if turn % 2 else reversed(CASES):
            requests = [case.request(row, runner.card.id, MAX_TOKENS) for row in range(rows)]
            turns[case.name].append(decode(engine, tokenizer, requests, tokens))
    return turns


def decode(engine: InProcess, tokenizer: Any, requests: Iterable[Request], tokens: int) -> dict[str, float]:
    """Tokens per second and CPU time per token while a row for each request decodes."""
    batch: list[Sequence] = []
    for row, request in enumerate(requests):
        prompt = tokenizer.apply_chat_template(question(row), add_generation_prompt=True)
        batch.append(engine.submit_request(prompt, request))
    while not all(row.generated for row in batch):
        engine.step()
    start, start_cpu, before = time.perf_counter(), time.process_time(), sum(len(row.generated) for row in batch)
    for _ in range(tokens):
        engine.step()
    took_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    count = sum(len(row.generated) for row in batch) - before
    engine.clear(batch)
    return {"tokens_per_s": count / took_s, "cpu_ms": 1000 * cpu_s / count}


if __name__ == "__main__":
    prefer_openblas()
    print(json.dumps(compare(**{**(given := json.load(sys.stdin)), "model": Path(given["model"])})))
