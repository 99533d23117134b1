"""Measures which rows of a model may share passes without changing their logits.

A model that ignores padding, or counts positions from it, gives different text when its rows are batched, without any
other symptom. So each model runs a few random prompts when it is loaded, alone and batched. The logits are compared
rather than the tokens, because the tokens of random prompts reveal little.

A device rounds batches of different shapes differently, which is not an error. The size of this effect is measured on
rows of equal length, which need no padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import mlx.core as mx

from worker.models.load import first_line
from worker.runner import kv_cache
from worker.runner.batching import passes
from worker.runner.batching.layer_sample import in_float32, sample_of
from worker.runner.batching.passes import ANSWER, Passes, Sample
from worker.runner.batching.support import BatchingSupport, Together
from worker.runner.memory import is_out_of_memory

LENGTHS = (4, 11, 23, 41)
"""Tokens of the prompts: three rows that need padding beside the longest one."""
LARGEST_WINDOW = 128
"""A sliding window of at most this many tokens is filled: the prompts are tried a second time, longer by a window."""

TOLERANCE = {"together": 1e-3, "pieces": 1e-3}
TOLERANCE_SHORT = {"together": 1e-2, "pieces": 5e-2}
"""Deviations that count as equal, in float32 and in shorter types. On a CPU, correct rows deviated by at most 1e-5
in float32. In bfloat16 they deviated by 0, or by 0.02 where a state-space layer computes several tokens together
differently than one by one. Wrong rows deviated by 0.08 and more."""
TIMES_EQUAL, TIMES_PIECES = 5, 2
"""Rows of different lengths may also deviate this many times as much as those of equal length, or in other pieces."""
WRONG = 0.1
"""Deviation above which rows of equal length count as wrong instead of inaccurate."""

SPARSE = {"index_topk": 8, "index_topk_blocks": 2, "index_block_size": 4}
"""Options of sparse-attention layers, with values for which they select tokens even in a short context."""


class CannotRun(Exception):
    """The model cannot run even a single row."""


def proving(model: Any, vocabulary: int, spare_bytes: int = 0) -> Generator[None, None, BatchingSupport]:
    """Measure a model. Use only some of its layers, if these run without the others.

    Args:
        vocabulary: number of tokens in the embedding.
        spare_bytes: memory for a copy of the weights in float32, in which mistakes differ most from rounding.

    Yields:
        After each pass.

    Raises:
        CannotRun: the model cannot be served.
    """
    sample = sample_of(model)
    try:
        found, errors = yield from _proving(sample, vocabulary, spare_bytes)
    except CannotRun:
        if sample is model:
            raise
        errors = True
    if errors and sample is not model:  # perhaps the missing layers are to blame
        found, _ = yield from _proving(model, vocabulary, spare_bytes)
    return found


def _proving(model: Any, vocabulary: int, spare_bytes: int) -> Generator[None, None, tuple[BatchingSupport, bool]]:
    """Measure a model; the verdict, and whether a pass raised."""
    # In shorter types, rounding would change which tokens such a layer selects.
    with in_float32(model, spare_bytes) as exactly, _sparse(model) if exactly else nullcontext():
        return (yield from _Proof(model, vocabulary).run())


class _Proof:
    def __init__(self, model: Any, vocabulary: int) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._exactly = True
        self._deviations: dict[str, float] = {}
        self._errors: dict[str, str] = {}

    def run(self) -> Generator[None, None, tuple[BatchingSupport, bool]]:
        window = kv_cache.window(self._model)
        for more in (0, window) if 0 < window <= LARGEST_WINDOW else (0,):
            uneven = yield from self._samples([length + more for length in LENGTHS])
            yield from self._measure_alone(uneven[1:])
            if kv_cache.mergeable(self._model):
                even = yield from self._samples([uneven[-1].length] * (len(LENGTHS) - 1))
                yield from self._measure_together([*even, uneven[-1]], uneven)
        return self._verdict(), bool(self._errors)

    def _samples(self, lengths: Sequence[int]) -> Generator[None, None, list[Sample]]:
        samples: list[Sample] = []
        for length in lengths:
            ids = tuple(self._random.randrange(self._vocabulary) for _ in range(length + ANSWER))
            try:
                samples.append((yield from passes.run_alone(self._model, ids, length)))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise CannotRun(f"The model does not run: {first_line(error)}") from error
            self._exactly = samples[-1].dtype == mx.float32
        return samples

    def _measure_alone(self, samples: Sequence[Sample]) -> Generator[None, None, None]:
        yield from self._measure("pieces", self._each(samples, passes.in_pieces))
        yield from self._measure("takeover", self._each(samples, passes.taken_over))
        if not self._continues:
            yield from self._measure("whole", self._each(samples, passes.whole))

    def _measure_together(self, even: Sequence[Sample], uneven: Sequence[Sample]) -> Generator[None, None, None]:
        model, continues = self._model, self._continues
        yield from self._measure("equal", passes.without_padding(model, even, continues=continues))
        yield from self._measure("behind", passes.padded_behind(model, uneven, continues=continues))
        yield from self._measure("before", passes.padded_before(model, uneven, continues=continues))

    def _measure(self, name: str, running: Passes) -> Generator[None, None, None]:
        try:
            deviation = yield from running
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._errors[name] = first_line(error)
        else:
            self._deviations[name] = max(deviation, self._deviations.get(name, 0.0))

    def _each(self, samples: Sequence[Sample], run: Callable[[Any, Sample], Passes]) -> Passes:
        """Run samples one after another."""
        deviations: list[float] = []
        for sample in samples:
            deviations += [(yield from run(self._model, sample))]
        return median(deviations)

    def _tolerance(self, name: str) -> float:
        least = TOLERANCE if self._exactly else TOLERANCE_SHORT
        if name in ("pieces", "takeover", "whole"):
            return least["pieces"]
        equal, *pieces = (self._deviations.get(each, 0.0) for each in ("equal", "pieces", "takeover"))
        noise = TIMES_EQUAL * equal if equal <= WRONG else 0.0
        return max(least["together"], noise, TIMES_PIECES * max(pieces) if self._continues else 0.0)

    def _exact(self, name: str) -> bool:
        return name not in self._errors and self._deviations.get(name, math.inf) <= self._tolerance(name)

    @property
    def _continues(self) -> bool:
        return self._exact("pieces") and self._exact("takeover")

    def _verdict(self) -> BatchingSupport:
        if not self._continues and not self._exact("whole"):
            raise CannotRun(f"Its batch cache changes even a single row: {self._found('whole')}.")
        equal = "equal" not in self._errors and self._deviations.get("equal", math.inf) <= WRONG
        slower = Together.EQUAL_LENGTHS if equal else Together.ONE_BY_ONE
        prefill, decode = (Together.ANY if equal and self._exact(name) else slower for name in ("behind", "before"))
        return BatchingSupport(prefill, decode, self._continues, "; ".join(self._reasons(equal=equal)))

    def _reasons(self, *, equal: bool) -> Iterator[str]:
        if not kv_cache.mergeable(self._model):
            yield "mlx-lm has no batch cache for this architecture"
        elif not equal:
            yield f"rows change each other: {self._found('equal')}"
        else:
            for name in ("behind", "before"):
                if not self._exact(name):
                    yield f"padding {name} a prompt changes its row: {self._found(name)}"
        if not self._continues:
            name = "takeover" if self._exact("pieces") else "pieces"
            yield f"a prompt processed in other pieces gives another row: {self._found(name)}"

    def _found(self, name: str) -> str:
        if name in self._errors:
            return self._errors[name]
        return f"logits differ by {self._deviations.get(name, math.inf):.2g} standard deviations"


@contextmanager
def _sparse(model: Any) -> Iterator[None]:
    """Make sparse-attention layers select tokens even in a short context."""
    changed = []
    for _, module in model.named_modules():
        for name, value in SPARSE.items():
            before = vars(module).get(name)
            if isinstance(before, int) and before > value:
                changed.append((module, name, before))
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, before in changed:
            setattr(module, name, before)
