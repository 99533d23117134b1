"""What decoding long contexts together costs, and what a row costs that joins a batch, by kind of layer.

The caches contain random numbers instead of prompts: reading 8 × 32,768 tokens would take most of an hour on a CPU, and
the time of a step does not depend on the numbers. `python -m tests.bench.long_contexts`, with `{"model": FOLDER,
"rounds": …}` on standard input, measures one model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from rich.table import Table

from scripts.model_files.shapes import TINY, TINY_HYBRID, TINY_WINDOW
from shared.blas import prefer_openblas
from shared.jobs.request import Request
from tests.bench.in_process import GREEDY
from tests.bench.processes import run_module

if TYPE_CHECKING:
    from worker.runner.base import Row
    from worker.runner.kv_cache import KVCache
    from worker.runner.length_buckets import LengthBuckets

LONG: Final = 32_768
CASES: Final[dict[str, tuple[int, ...]]] = {
    "8 rows of 32k": (LONG,) * 8,
    "4 of 32k, 4 of 2k": (LONG, 2_048) * 4,
    "1 of 32k, 7 of 2k": (*(2_048,) * 7, LONG),
    "4k, 8k, … 32k": tuple(range(4_096, LONG + 1, 4_096)),
}
"""Case → length of each row, in the order in which they join."""
JOINED_ROWS, JOINED_TOKENS = 32, 2_048
JOINS: Final = {"join 32 rows of 2k, place free": True, "join 32 rows of 2k, no place free": False}
_STEPS: Final = 9
_WARM_STEPS: Final = 3
_WITHIN_S: Final = 3600.0
_MEGABYTE: Final = 2**20

Figures = dict[str, dict[str, float]]


def long_contexts(tiny: Path, rounds: int) -> dict[str, Figures]:
    """Model → case → figures: the model, or all three kinds of the tiny one, each in a process."""
    shapes = (TINY, TINY_WINDOW, TINY_HYBRID) if tiny.name == TINY.folder else ()
    models = [tiny.with_name(shape.folder) for shape in shapes] or [tiny]
    return {
        model.name: run_module("long_contexts", {"model": str(model), "rounds": rounds}, _WITHIN_S)
        for model in models
        if model.exists()
    }


def table(found: dict[str, Figures]) -> Table:
    """Medians over rounds. On a busy machine the ratio of CPU times is more reliable than that of wall times."""
    out = Table("model", "rows", title="long contexts, in process: a step, relative to steps of single rows")
    for heading in ("ms", "÷ single rows", "CPU ÷ single rows", "buckets", "join, ms", "copied MB", "cache MB"):
        out.add_column(heading, justify="right")
    for model, cases in found.items():
        for name, figures in cases.items():
            forms = {"ms": ".1f", "ratio": ".2f", "cpu_ratio": ".2f", "buckets": ".0f"}
            forms |= {"join_ms": ".1f", "copied_mb": ".1f", "cache_mb": ",.0f"}
            cells = [format(figures[key], form) if key in figures else "" for key, form in forms.items()]
            out.add_row(model, name, *cells)
    return out


@dataclass(slots=True)
class Bench:
    """A model, and rows with random caches."""

    model: Any
    make: Callable[[], LengthBuckets]
    _number: int = 0

    def case(self, lengths: Sequence[int]) -> dict[str, float]:
        """Measure a step of rows of these lengths, and of each alone."""
        single = [self._steps([length])[0] for length in sorted(set(lengths))]
        alone = dict(zip(sorted(set(lengths)), single, strict=True))
        (wall_s, cpu_s), buckets = self._steps(lengths)
        return {
            "ms": 1000 * wall_s,
            "ratio": wall_s / sum(alone[length][0] for length in lengths),
            "cpu_ratio": cpu_s / sum(alone[length][1] for length in lengths),
            "buckets": buckets,
        }

    def join(self, rows: int, tokens: int, *, free: bool) -> dict[str, float]:
        """Measure how long it takes to join a batch, and how many bytes of the batch's cache that copies.

        Args:
            free: whether another row has just left, so that its place in the batch is free.
        """
        import mlx.core as mx

        from worker.runner.kv_cache import KVCache

        buckets = self.make()
        joined, caches = zip(*(self._row(tokens) for _ in range(rows)), strict=True)
        cache = KVCache.of_rows(caches)
        del caches
        buckets.join(joined, cache)  # takes the cache over
        row, more = self._row(tokens)
        if free:
            buckets.remove([joined[0].uid])
        for _ in range(_WARM_STEPS):
            buckets.step()
        mx.synchronize()
        before = _buffers(cache)

        def join() -> None:
            buckets.join([row], more)
            mx.eval(cache.states)

        seconds, _ = _seconds(join)
        copied = sum(new[1] for old, new in zip(before, _buffers(cache), strict=True) if new != old)
        return {"join_ms": 1000 * seconds, "copied_mb": copied / _MEGABYTE, "cache_mb": cache.nbytes / _MEGABYTE}

    def _steps(self, lengths: Sequence[int]) -> tuple[tuple[float, float], int]:
        """Median wall time and CPU time of a step, and the number of length buckets."""
        buckets = self.make()
        for length in lengths:
            self._add(buckets, length)
        for _ in range(_WARM_STEPS):
            buckets.step()
        walls, cpus = zip(*(_seconds(buckets.step) for _ in range(_STEPS)), strict=True)
        return (statistics.median(walls), statistics.median(cpus)), len(buckets.lengths)

    def _add(self, buckets: LengthBuckets, tokens: int) -> None:
        row, cache = self._row(tokens)
        buckets.join([row], cache)

    def _row(self, tokens: int) -> tuple[Row, KVCache]:
        from worker.runner.base import Row

        self._number += 1
        row = Row(self._number, Request("", LONG, GREEDY), (1,) * (tokens + 1), 0, LONG)
        return row, random_cache(self.model, tokens)


def random_cache(model: Any, tokens: int) -> KVCache:
    """Return the cache of one row of this many tokens, with random keys and values."""
    import mlx.core as mx

    from worker.runner import kv_cache

    one = kv_cache.KVCache.empty(model)
    model(mx.array([[1]], dtype=mx.uint32), cache=one.layers)
    held = [min(tokens, part.window or tokens) for part in one.attention]
    columns = [
        [mx.random.normal((*array.shape[:2], count, array.shape[3])).astype(array.dtype) for array in part.arrays]
        for part, count in zip(one.attention, held, strict=True)
    ]
    cache = kv_cache.row_of(model, columns, one.copy_states(0), tokens)
    mx.eval(cache.states)
    return cache


def _buffers(cache: KVCache) -> list[tuple[int, int]]:
    """Address and bytes of each array of a cache. An operation that does not copy an array leaves it where it is."""
    import numpy as np
    from mlx.utils import tree_flatten

    found = cast("list[tuple[str, Any]]", tree_flatten(cache.states))
    arrays = [array for _, array in found if array is not None]
    return [(np.asarray(array).ctypes.data, array.nbytes) for array in arrays]


def _seconds(step: Callable[[], object]) -> tuple[float, float]:
    start, start_cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure(model: Path, rounds: int) -> Figures:
    """Measure all cases in each round; medians over rounds."""
    from worker.models.load import load_model
    from worker.runner.decode import DecodeBatch
    from worker.runner.kv_cache import Footprint
    from worker.runner.length_buckets import LengthBuckets
    from worker.runner.prefix.cache import PrefixCache
    from worker.runner.speculation.ngram import NgramProposer
    from worker.runner.speculation.verification import Speculation
    from worker.runner.weights import padding_worth_a_pass

    loaded = load_model(model)
    footprint, padding = Footprint.of(loaded.model), padding_worth_a_pass(loaded)

    def batch() -> DecodeBatch:
        return DecodeBatch(loaded.model, PrefixCache(loaded.model, 0), Speculation(loaded.model, 0, [NgramProposer()]))

    bench = Bench(loaded.model, lambda: LengthBuckets(batch, footprint, padding))
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, lengths in CASES.items():
            found.setdefault(name, []).append(bench.case(lengths))
        for name, free in JOINS.items():
            found.setdefault(name, []).append(bench.join(JOINED_ROWS, JOINED_TOKENS, free=free))
    return {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()
    }


if __name__ == "__main__":
    prefer_openblas()
    given = json.load(sys.stdin)
    print(json.dumps(measure(Path(given["model"]), given["rounds"])))
