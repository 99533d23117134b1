"""What a draft model costs that is always wrong: it must switch itself off.

The engine runs in process: `python -m tests.bench.bad_draft`, with `{"model": FOLDER, "rounds": …, "tokens": …}` on
standard input, measures one model. Answers are sampled, so that they do not repeat themselves, and the draft models
always propose the same token.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from shared.blas import prefer_openblas
from shared.jobs.request import Sampling
from tests.bench.processes import run_module

if TYPE_CHECKING:
    from tests.bench.in_process import InProcess
    from worker.models.load import LoadedModel
    from worker.runner.model_runner import MLXRunner

_DRAFTS: Final = {"an eighth of the layers": 8, "a quarter of the layers": 4}
_ROWS: Final = (1, 4)
_PROMPT_TOKENS: Final = 40
_TOKENS: Final = 1200
"""Tokens of each answer: more than two pauses of the draft model."""
_PROPOSED, _BIAS = 7, 1e4
_MEMORY_BYTES: Final = 4 * 2**30
_WITHIN_S: Final = 3600.0

Turns = dict[str, list[dict[str, float]]]
"""Case → figures of each turn."""


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of a run, by both clocks, and draft tokens."""

    wall_s: float
    cpu_s: float
    drafted: float


def bad_draft(model: Path, rounds: int) -> Turns:
    """Measure a model in another process."""
    given = {"model": str(model), "rounds": rounds, "tokens": _TOKENS}
    turns: Turns = run_module("bad_draft", given, _WITHIN_S)
    return turns


def table(found: Turns) -> Table:
    """Medians over turns. On a busy machine the ratio of CPU times is more reliable than that of wall times."""
    out = Table("draft model", title="a draft model that is always wrong: time relative to no draft model")
    for heading in ("time", "lowest", "highest", "CPU time", "draft tokens"):
        out.add_column(heading, justify="right")
    for name, turns in found.items():
        ratios = [turn["wall"] for turn in turns]
        spread = (f"{of(ratios):.3f}" for of in (statistics.median, min, max))
        others = (statistics.median(turn[key] for turn in turns) for key in ("cpu", "drafted"))
        out.add_row(name, *spread, *(f"{value:,.3f}" for value in others))
    return out


def compare(model: Path, rounds: int, tokens: int) -> Turns:
    """Measure every draft model and no draft model in turns."""
    from tests.bench.in_process import InProcess
    from worker.models.load import load_model

    loaded = load_model(model)
    plain = InProcess(_runner(loaded, None))
    drafts = {name: InProcess(_runner(loaded, _llama(loaded, divisor))) for name, divisor in _DRAFTS.items()}
    turns: Turns = {}
    for turn in range(rounds):
        for name, engine in drafts.items():
            for rows in _ROWS:
                order = (plain, engine) if turn % 2 else (engine, plain)
                runs = {each is engine: _decode(each, rows, tokens) for each in order}
                turns.setdefault(f"{name}, {rows} row{'s' if rows > 1 else ''}", []).append({
                    "wall": runs[True].wall_s / runs[False].wall_s,
                    "cpu": runs[True].cpu_s / runs[False].cpu_s,
                    "drafted": runs[True].drafted,
                })  # fmt: skip
    return turns


def _runner(loaded: LoadedModel, draft: LoadedModel | None) -> MLXRunner:
    from shared.settings import Settings
    from worker.runner.memory import Memory
    from worker.runner.model_runner import MLXRunner, default_chunk

    tokens = Settings(_env_file=None).speculation_tokens
    memory = Memory(_MEMORY_BYTES, _MEMORY_BYTES // 4)
    runner = MLXRunner(loaded, default_chunk(), memory, speculation_tokens=tokens, draft=draft)
    runner.warm()
    runner.eos = frozenset()
    return runner


def _llama(loaded: LoadedModel, divisor: int) -> LoadedModel:
    """Return a llama as wide as the model, with a fraction of its layers, that always proposes the same token."""
    import mlx.core as mx
    from mlx_lm.models import llama

    class Stubborn(llama.Model):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            logits: mx.array = super().__call__(*args, **kwargs)
            return logits.at[..., _PROPOSED].add(_BIAS)

    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    config: dict[str, Any] = {name: loaded.config[name] for name in (*names, "vocab_size")}
    layers = max(1, loaded.config["num_hidden_layers"] // divisor)
    mx.random.seed(divisor)
    config |= {"model_type": "llama", "num_hidden_layers": layers}
    model = Stubborn(llama.ModelArgs.from_dict(config))  # type: ignore[no-untyped-call]
    mx.eval(model.parameters())
    return replace(loaded, model=model)


def _decode(engine: InProcess, rows: int, tokens: int) -> Run:
    """Decode rows from their first token to their last."""
    drafted = engine.runner.stats()["speculation_drafted_tokens_total"]
    prompts = [[(row * 977 + i * 131) % 40_000 + 100 for i in range(_PROMPT_TOKENS)] for row in range(rows)]
    batch = [engine.submit(prompt, tokens, Sampling(1.0, seed=row)) for row, prompt in enumerate(prompts)]
    while not all(row.generated for row in batch):
        engine.step()
    start, start_cpu = time.perf_counter(), time.process_time()
    while any(row.ending is None for row in batch):
        engine.step()
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    drafted = engine.runner.stats()["speculation_drafted_tokens_total"] - drafted
    engine.clear(batch)
    return Run(wall_s, cpu_s, drafted)


if __name__ == "__main__":
    prefer_openblas()
    parameters = json.load(sys.stdin)
    print(json.dumps(compare(Path(parameters["model"]), parameters["rounds"], parameters["tokens"])))
