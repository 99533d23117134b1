"""The worker's engine alone, in process, with and without speculation: reads what to run as JSON, writes the figures.

python -m tests.bench.draft_tokens, with `{"model": FOLDER, "rounds": …, "tokens": …}` on standard input
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.blas import prefer_openblas
from shared.jobs.request import Sampling
from tests.bench.plans import Json
from tests.bench.prompts import question

if TYPE_CHECKING:
    from tests.bench.in_process import InProcess

TEXTS: Final = (
    "On Monday morning Anna walked down to the harbour, bought two loaves of bread and a newspaper, and waited there.",
    "The committee met twice in March, approved the budget for the library, and asked for a new drawing of the hall.",
    "Take a large bowl, mix the flour with the salt, add warm water slowly, and let the dough rest for one hour.",
    "The river rises in the northern hills, runs south past three old towns, and reaches the sea near a lighthouse.",
)


@dataclass(frozen=True, slots=True)
class Case:
    """Rows that decode together: whether their answers repeat their prompts, and whether they are drawn."""

    rows: int
    repeats: bool
    temperature: float = 0.0

    @property
    def name(self) -> str:
        """As the table calls it."""
        kind = "repeats its prompt" if self.repeats else "does not"
        return f"{kind}{', drawn' if self.temperature else ''}, {self.rows} row{'s' if self.rows > 1 else ''}"

    def messages(self, row: int, turn: int) -> list[Json]:
        """What a row is asked in a turn: something else in each."""
        if not self.repeats:
            return question(row + self.rows * turn)
        text = " ".join(TEXTS[(row + turn + i) % len(TEXTS)] for i in range(2))
        return [{"role": "user", "content": f"Repeat the following text word for word: {text}"}]


CASES: Final = (
    *(Case(rows, repeats=True) for rows in (1, 2, 4)),
    *(Case(rows, repeats=False) for rows in (1, 2, 4)),
    Case(1, repeats=False, temperature=1.0),
)


def run(engine: InProcess, tokenizer: Any, case: Case, turn: int, most: int) -> dict[str, Any]:
    """Tokens a second after the first, the CPU time of each, and the tokens of all rows."""
    prompts = [tokenizer.apply_chat_template(case.messages(row, turn), add_generation_prompt=True)
               for row in range(case.rows)]  # fmt: skip
    rows = [
        engine.submit(prompt, most, Sampling(case.temperature, seed=number), owner=f"turn {turn}")
        for number, prompt in enumerate(prompts)
    ]
    began, cpu_s, before = 0.0, 0.0, 0
    while any(row.ending is None for row in rows):
        engine.step()
        if not began and all(row.generated for row in rows):
            began, cpu_s, before = time.perf_counter(), time.process_time(), sum(len(row.generated) for row in rows)
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    tokens = sum(len(row.generated) for row in rows) - before
    return {"tokens_per_s": tokens / took_s, "cpu_ms": 1000 * cpu_s / tokens, "said": [row.generated for row in rows]}


def compare(model: Path, rounds: int, tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Every case in turns with and without speculation: case → what each turn gave."""
    from mlx_lm.utils import load_tokenizer

    from shared.settings import Settings
    from tests.bench.in_process import InProcess, load_runner

    most = Settings(_env_file=None).speculation_tokens
    tokenizer = load_tokenizer(model)  # type: ignore[no-untyped-call]
    ways = {name: InProcess(load_runner(model, n)) for name, n in (("without", 0), ("with", most))}
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in CASES}
    for turn in range(rounds):
        for case in CASES:
            before = ways["with"].runner.stats()
            order = ("without", "with") if turn % 2 else ("with", "without")
            told = {name: run(ways[name], tokenizer, case, turn, tokens) for name in order}
            after = ways["with"].runner.stats()
            found[case.name].append({
                **{name: each["tokens_per_s"] for name, each in told.items()},
                "cpu_ratio": told["with"]["cpu_ms"] / told["without"]["cpu_ms"],
                "same": told["with"]["said"] == told["without"]["said"],
                **{key: after[f"speculation_{key}_tokens_total"] - before[f"speculation_{key}_tokens_total"]
                   for key in ("drafted", "accepted")},
            })  # fmt: skip
    return found


if __name__ == "__main__":
    prefer_openblas()
    asked = json.load(sys.stdin)
    print(json.dumps(compare(Path(asked["model"]), asked["rounds"], asked["tokens"])))
