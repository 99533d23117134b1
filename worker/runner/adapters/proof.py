"""Checks that rows with different adapters get the same logits together as alone, on this architecture.

A layer that reorders the rows of a pass would give a row the adapter of another one.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from typing import Any, Final, cast

import mlx.core as mx

from worker.models.load import first_line
from worker.runner import forward
from worker.runner.adapters.table import Table
from worker.runner.kv_cache import KVCache
from worker.runner.memory import is_out_of_memory

_TOKENS: Final = 17
TOLERANCE, TOLERANCE_SHORT = 1e-3, 0.1
"""Deviations of the logits, in standard deviations, that count as equal in float32 and in shorter types. A row with the
adapter of another one deviates by more than 0.3."""


def proving(
    model: Any, tables: Sequence[Table], slots: int, vocabulary: int, *, alone: bool = False
) -> Generator[None, None, str]:
    """Run rows with random adapters, alone and together.

    Args:
        slots: number of slots besides the empty one; those used here must be written before a row uses them.
        alone: rows of this model never share a pass, so it only has to run.

    Yields:
        After each pass.

    Returns:
        Why the architecture cannot use adapters; empty if it can.
    """
    source = random.Random(0)
    used = [0, 1, min(2, slots), 0]
    ids = [[source.randrange(vocabulary) for _ in range(_TOKENS)] for _ in used]
    try:
        for slot in {*used} - {0}:
            _fill(tables, slot, source)
            yield
        expected = yield from _one_by_one(model, ids, used)
        if alone:
            return ""
        together = _logits(model, ids, used)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"the model does not run with adapters ({first_line(error)})"
    return _difference(together, expected)


def _one_by_one(model: Any, ids: Sequence[Sequence[int]], slots: Sequence[int]) -> Generator[None, None, mx.array]:
    """Return the logits of rows that each have a pass of their own."""
    logits = []
    for row, slot in zip(ids, slots, strict=True):
        logits.append(_logits(model, [row], [slot]))
        mx.eval(logits[-1])
        yield
    return mx.concatenate(logits)


def _difference(logits: mx.array, expected: mx.array) -> str:
    """Describe by how much logits deviate; empty if they count as equal."""
    finite = mx.isfinite(expected)  # some models never choose certain tokens
    logits, expected = (mx.where(finite, each, 0) for each in (logits, expected))
    difference = mx.abs(logits - expected).mean(axis=-1).max() / (mx.std(expected) + 1e-9)
    deviation = cast("float", difference.item())
    if deviation <= (TOLERANCE if expected.dtype == mx.float32 else TOLERANCE_SHORT):
        return ""
    return f"rows of this architecture get adapters of others: logits differ by {deviation:.2g} standard deviations"


def _fill(tables: Sequence[Table], slot: int, source: random.Random) -> None:
    """Write random matrices that change the output by about as much as the layer itself."""
    for table in tables:
        shape = table.shape
        keys = [mx.random.key(source.getrandbits(32)) for _ in range(2)]
        a = mx.random.normal((shape.experts, shape.inputs, shape.rank), key=keys[0]) / shape.inputs**0.5
        b = mx.random.normal((shape.experts, shape.rank, shape.outputs), key=keys[1]) / shape.inputs**0.5
        table.write(slot, a, b)
        mx.eval(table.arrays)


def _logits(model: Any, ids: Sequence[Sequence[int]], slots: Sequence[int]) -> mx.array:
    """Return the logits after the last token: [rows, vocabulary]."""
    cache = KVCache.empty(model, len(ids))
    forward.fill(model, cache, [row[:-1] for row in ids], slots=forward.slot_array(slots))
    logits = forward.fill(model, cache, [row[-1:] for row in ids], slots=forward.slot_array(slots))
    if logits is None:
        raise ValueError("a pass needs a token")
    return logits[:, -1]
