"""What more rows give in all: tokens a second of batches that only decode, by the number of rows and their contexts.

python -m scripts.commands.benching.batches ROUNDS MODEL_FOLDER...

In the lanes that the worker decodes in. Caches are made up instead of read: what is in them costs nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from shared.blas import prefer_openblas
from shared.jobs.request import Sampling
from shared.settings import ROOT

if TYPE_CHECKING:
    from worker.models.load import LoadedModel
    from worker.runner.length_buckets import Lanes
    from worker.runner.memory import Footprint

MODELS: Final = ("SmolLM2-135M-Instruct",)
"""Measured where they are there, beside the model that was asked for."""
ROWS: Final = (1, 4, 8, 16, 32, 64)
CONTEXTS: Final = ((100,), (1000,), (2000,), (4000,), (100, 4000))
"""Tokens of the rows; of several, rows take turns."""
MOST_BYTES: Final = 6 * 2**30
"""Of caches; what needs more is left out."""
_WARM_STEPS, _STEPS = 2, 5

Cell = tuple[str, tuple[int, ...], int]
"""Model, contexts, rows."""


def batches(tiny: Path, rounds: int) -> dict[str, Any]:
    """All sizes in turns, in a process of its own: OpenBLAS must be there before MLX is."""
    folders = [tiny, *(path for name in MODELS if (path := tiny.parent / name).is_dir())]
    command = [sys.executable, "-m", "scripts.commands.benching.batches", str(rounds), *map(str, folders)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return found


def measured(folders: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Tokens a second in all, of the quickest step of each size and of the median one."""
    from worker.models.load import load_model

    took_s: dict[Cell, list[float]] = {}
    for folder in folders:
        loaded = load_model(folder)
        for _, contexts, rows in itertools.product(range(rounds), CONTEXTS, ROWS):
            took_s.setdefault((folder.name, contexts, rows), []).extend(_steps(loaded, contexts, rows))
    return {
        "load": os.getloadavg()[0],
        "speeds": [
            {
                "model": model,
                "contexts": contexts,
                "rows": rows,
                "best": rows / min(each),
                "median": rows / statistics.median(each),
            }
            for (model, contexts, rows), each in took_s.items()
            if each
        ],
    }


def _steps(loaded: LoadedModel, contexts: tuple[int, ...], rows: int) -> Iterator[float]:
    """How long steps of such a batch take; none where it would not fit."""
    import mlx.core as mx

    from worker.runner.memory import Footprint

    footprint = Footprint.of(loaded.model)
    lengths = [length for length, _ in zip(itertools.cycle(contexts), range(rows), strict=False)]
    if sum(map(footprint.bytes, lengths)) > MOST_BYTES:
        return
    lanes = _decoding(loaded, footprint, lengths)
    for _ in range(_WARM_STEPS):
        lanes.step()
    for _ in range(_STEPS):
        start = time.perf_counter()
        lanes.step()
        yield time.perf_counter() - start
    lanes.clear()
    mx.clear_cache()


def _decoding(loaded: LoadedModel, footprint: Footprint, lengths: list[int]) -> Lanes:
    """Rows of these lengths in lanes."""
    from worker.runner.base import Row
    from worker.runner.length_buckets import Lanes
    from worker.runner.model_runner import padding_worth_a_pass
    from worker.runner.prefix_cache import PrefixCache
    from worker.runner.speculation.verification import Speculation

    prefixes, speculation = PrefixCache(loaded.model, 0, None), Speculation(loaded.model, 0)
    lanes = Lanes(loaded.model, prefixes, footprint, padding_worth_a_pass(loaded), speculation)
    uids = itertools.count(1)
    for length in sorted(set(lengths)):
        prompt = (1,) * (length + 1)
        rows = [Row(next(uids), prompt, 0, 100, Sampling(temperature=0.0)) for each in lengths if each == length]
        lanes.join(rows, _made_up(loaded.model, len(rows), length))
    return lanes


def _made_up(model: Any, rows: int, length: int) -> list[Any]:
    """A cache of rows of so many tokens, with room for the steps to come."""
    import mlx.core as mx

    from worker.runner import kv_cache as kv

    sample = kv.empty(model, 1)
    kv.feed(model, sample, [(1,)])
    layers = kv.empty(model, rows)
    for layer, one in zip(layers, sample, strict=True):
        columns = mx.random.normal((1, *one.keys.shape[1:2], length, one.keys.shape[3])).astype(one.keys.dtype)
        many = mx.broadcast_to(columns, (rows, *columns.shape[1:]))
        layer.update_and_fetch(many, many)
        kv.reserve([layer], length + _WARM_STEPS + _STEPS + 1)
        mx.eval(layer.state)
    return layers


def table(results: dict[str, Any]) -> Table:
    """What people read."""
    out = Table("model", "contexts", title="decode, tokens/s in all by rows: quickest step (median step)")
    for rows in ROWS:
        out.add_column(str(rows), justify="right")
    found = {(each["model"], tuple(each["contexts"]), each["rows"]): each for each in results["speeds"]}
    for model, contexts in dict.fromkeys(cell[:2] for cell in found):
        cells = (found.get((model, contexts, rows)) for rows in ROWS)
        shown = (f"{each['best']:,.0f} ({each['median']:,.0f})" if each else "" for each in cells)
        out.add_row(model, " and ".join(f"{length:,}" for length in contexts), *shown)
    return out


def main() -> None:
    """Measure, print it as JSON."""
    prefer_openblas()
    print(json.dumps(measured([Path(each) for each in sys.argv[2:]], int(sys.argv[1]))))


if __name__ == "__main__":
    main()
