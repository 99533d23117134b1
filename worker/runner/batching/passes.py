"""The passes of a proof: run samples alone and together, in every way in which the runner combines rows."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, TypeAlias

import mlx.core as mx

from worker.runner import forward, kv_cache
from worker.runner.kv_cache import KVCache
from worker.runner.kv_segments import Checkpoint, Layout, Segment

ANSWER = 4
"""Tokens of a sample after its prompt."""
_PIECE = 2
"""Tokens of an answer that are processed in one pass, as when a row continues on another worker."""
_COMPARED = 1024
"""Number of logits that are compared, from all over the vocabulary."""

Passes: TypeAlias = Generator[None, None, float]
"""Runs one pass at a time; returns the deviation of the logits."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A random prompt and answer.

    Attributes:
        length: number of prompt tokens.
        logits: logits after each token when the sample runs alone: [tokens, logits compared], in float32.
        dtype: type in which the model computed them.
    """

    ids: tuple[int, ...]
    length: int
    logits: mx.array
    dtype: mx.Dtype


class Batch:
    """Samples that share passes.

    In each pass the median of the rows counts: a rounding difference may send a single row to another expert of a
    mixture, while ignored padding changes every padded row.

    Attributes:
        deviation: largest difference from the logits of the samples alone, in standard deviations of those.
    """

    def __init__(self, model: Any, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)
        self.done = [0] * len(samples)
        self.cache = KVCache.empty(model, len(samples))
        self.deviation = 0.0
        self._model = model

    def read(self, tokens: Sequence[int] | int) -> Iterator[None]:
        """Process the next tokens of each sample in one pass, and compare the logits after the last of them."""
        counts = [tokens] * len(self.done) if isinstance(tokens, int) else tokens
        ids = [each.ids[done : done + count] for each, done, count in zip(self.samples, self.done, counts, strict=True)]
        logits = _compared(forward.fill(self._model, self.cache, ids))
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]
        deviations = [
            _deviation(logits[row, count - 1], self.samples[row].logits[self.done[row] - 1])
            for row, count in enumerate(counts)
        ]
        mx.eval(self.cache.states)
        self.deviation = max(self.deviation, median_low(deviations))
        yield

    def join(self, *others: Batch) -> None:
        """Add the rows of other batches."""
        for other in others:
            self.cache.extend(other.cache)
            self.samples += other.samples
            self.done += other.done
            self.deviation = max(self.deviation, other.deviation)

    def leave(self) -> None:
        """Remove the first row."""
        self.cache.keep_rows(range(1, len(self.done)))
        del self.samples[0], self.done[0]

    def reuse(self) -> None:
        """Copy the only row to a new cache, as a prefix is, if rows of this model can be stored."""
        layout = Layout.of(self._model)
        if layout is not None:
            segment = Segment.copy_from(self.cache, 0, 0, self.done[0])
            self.cache = layout.row([segment], Checkpoint.copy_from(self.cache, 0), self.done[0])


def run_alone(model: Any, ids: tuple[int, ...], length: int) -> Generator[None, None, Sample]:
    """Run a sample in mlx-lm's cache of a single sequence: the prompt in one pass, the answer token by token."""
    cache = KVCache(kv_cache.empty_row(model))
    found, dtype = [], mx.float32
    for part in (ids[:length], *([token] for token in ids[length:])):
        logits = forward.fill(model, cache, [part])
        dtype = dtype if logits is None else logits.dtype
        found.append(_compared(logits)[0])
        mx.eval(found[-1], cache.states)
        yield
    return Sample(ids, length, mx.concatenate(found), dtype)


def whole(model: Any, sample: Sample) -> Passes:
    """A prompt in one pass, and some decode steps."""
    batch = Batch(model, [sample])
    for tokens in (sample.length, 1, 1):
        yield from batch.read(tokens)
    return batch.deviation


def in_pieces(model: Any, sample: Sample) -> Passes:
    """A prompt in two passes, the second with a copy of the cache; and an answer of which two tokens share a pass."""
    half = sample.length // 2
    batch = Batch(model, [sample])
    yield from batch.read(half)
    batch.reuse()
    for tokens in (sample.length - half, 1, _PIECE):
        yield from batch.read(tokens)
    return batch.deviation


def taken_over(model: Any, sample: Sample) -> Passes:
    """A prompt and its answer in one pass, as when another worker continues a row."""
    batch = Batch(model, [sample])
    yield from batch.read(len(sample.ids))
    return batch.deviation


def without_padding(model: Any, samples: Sequence[Sample], *, continues: bool) -> Passes:
    """Prompts of equal length together. One joins late."""
    length = samples[0].length
    batch, late = Batch(model, samples[:-1]), Batch(model, samples[-1:])
    for each in (batch, late):
        yield from each.read(length)
        yield from each.read(1)
    batch.join(late)
    yield from batch.read(1)
    yield from _leaving(batch, continues=continues)
    return batch.deviation


def padded_behind(model: Any, samples: Sequence[Sample], *, continues: bool) -> Passes:
    """Prompts of different lengths together; in two passes, if that is exact for this model."""
    batch = Batch(model, samples)
    halves = [each.length // 2 if continues else 0 for each in samples]
    if continues:
        yield from batch.read(halves)
    yield from batch.read([each.length - half for each, half in zip(samples, halves, strict=True)])
    for _ in range(3):
        yield from batch.read(1)
    return batch.deviation


def padded_before(model: Any, samples: Sequence[Sample], *, continues: bool) -> Passes:
    """Prompts that were prefilled alone and join one after another, the longest last."""
    batch, *others = (Batch(model, [each]) for each in samples)
    for each, sample in zip((batch, *others), samples, strict=True):
        yield from each.read(sample.length)
    batch.join(*others[:-1])
    yield from batch.read(1)
    batch.join(others[-1])
    yield from batch.read(1)
    yield from _leaving(batch, continues=continues)
    return batch.deviation


def _leaving(batch: Batch, *, continues: bool) -> Iterator[None]:
    """One row leaves; the others process two tokens in one pass, if that is exact."""
    batch.leave()
    for tokens in (_PIECE,) if continues else (1, 1):
        yield from batch.read(tokens)


def _compared(logits: mx.array | None) -> mx.array:
    """Choose the logits that are compared."""
    if logits is None:
        raise ValueError("a pass needs a token")
    stride = -(-logits.shape[-1] // _COMPARED)
    return logits[..., ::stride].astype(mx.float32)


def _deviation(logits: mx.array, expected: mx.array) -> float:
    difference = (mx.abs(logits - expected).mean() / (mx.std(expected) + 1e-9)).tolist()
    return difference if isinstance(difference, float) and math.isfinite(difference) else math.inf
