"""Speed of rows with LoRA adapters, relative to the speed of rows of a model without adapters.

The engine runs in process: `python -m tests.bench.adapters`, with `{"model": FOLDER, "rounds": …, "rows": …,
"tokens": …}` on standard input, measures one model. The adapters have random weights, so the text makes no sense. No
row ends while it is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from rich.table import Table

from shared.blas import prefer_openblas
from shared.jobs.request import Request
from tests.bench.constrained import MAX_TOKENS, ROWS, Turns, decode, in_each_model, relative_table
from tests.bench.in_process import GREEDY, InProcess

if TYPE_CHECKING:
    from worker.runner.model_runner import MLXRunner

ADAPTERS: Final = 8
RANK: Final = 8
_ALL, _FEW = "all linear layers", "q_proj and v_proj"
_KEYS: Final[Mapping[str, tuple[str, ...] | None]] = {_ALL: None, _FEW: ("self_attn.q_proj", "self_attn.v_proj")}
"""Layers that an adapter changes; None: all of them."""
_MEMORY_BYTES: Final = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Case:
    """Which adapters the rows of a batch name.

    Attributes:
        layers: what the adapters change; None: the catalog entry has no adapters.
        adapters: number of different adapters; row n names adapter n modulo this number.
        plain: one row in this number has no adapter; 0: all rows have one.
    """

    name: str
    layers: str | None = None
    adapters: int = 0
    plain: int = 0

    def request(self, row: int, model: str) -> Request:
        """The request of a row."""
        has_adapter = self.adapters and not (self.plain and row % self.plain == 0)
        return Request(model, MAX_TOKENS, GREEDY, adapter=f"a{row % self.adapters}" if has_adapter else None)


PLAIN: Final = Case("plain")
CASES: Final = (
    PLAIN,
    Case("plain, adapters in the catalog", _ALL),
    Case(f"1 adapter x {ROWS} rows, {_ALL}", _ALL, 1),
    Case(f"8 adapters x 4 rows, {_ALL}", _ALL, 8),
    Case(f"half of the rows with 8 adapters, {_ALL}", _ALL, 8, plain=2),
    Case(f"8 adapters x 4 rows, {_FEW}", _FEW, 8),
)


def adapters(tiny: Path, rounds: int) -> dict[str, Turns]:
    """Measure the cases with each model; see `in_each_model`."""
    return in_each_model("adapters", tiny, rounds)


def table(found: dict[str, Turns]) -> Table:
    """The figures relative to plain rows."""
    return relative_table(found, PLAIN.name, f"{ROWS} rows, in process, rank {RANK}: tokens/s relative to plain rows")


def compare(model: Path, rounds: int, rows: int, tokens: int) -> Turns:
    """Measure every case in turns, in alternating order."""
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(model)  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as folder:
        engines: dict[str | None, InProcess] = {None: InProcess(_runner(model, {}))}
        for layers, keys in _KEYS.items():
            engines[layers] = InProcess(_runner(model, _write(model, Path(folder) / layers, keys)))
        turns: Turns = {case.name: [] for case in CASES}
        for turn in range(rounds):
            for case in CASES if turn % 2 else reversed(CASES):
                requests = [case.request(row, model.name) for row in range(rows)]
                turns[case.name].append(decode(engines[case.layers], tokenizer, requests, tokens))
    return turns


def _write(model: Path, folder: Path, keys: tuple[str, ...] | None) -> dict[str, Path]:
    """Write adapters with random weights; return their folders by name."""
    from tests.support.adapters import write_adapter

    names = [f"a{number}" for number in range(ADAPTERS)]
    return {name: write_adapter(model, folder / name, seed=n, rank=RANK, keys=keys) for n, name in enumerate(names)}


def _runner(model: Path, folders: dict[str, Path]) -> MLXRunner:
    from tests.support.adapters import runner_with

    limits = {"memory_limit_bytes": _MEMORY_BYTES, "adapter_bytes": _MEMORY_BYTES // 8, "speculation_tokens": 0}
    runner = runner_with(model, folders, **limits)
    runner.eos = frozenset()
    return runner


if __name__ == "__main__":
    prefer_openblas()
    print(json.dumps(compare(**{**(given := json.load(sys.stdin)), "model": Path(given["model"])})))
