"""Samples the next token of every row, for the whole batch at once.

The cost of a row depends on its options: greedy rows share one argmax, only sampled rows need noise, and only rows with
a filter pay for that filter.

The filters have the semantics of `mlx_lm.sample_utils.make_sampler`: top_p and min_p use the probabilities before the
temperature, and each of the three filters keeps the most likely tokens down to a threshold. The order of the filters
therefore does not matter, and the highest threshold applies. All tokens with a logit equal to the threshold are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from shared.jobs.request import Sampling

INVALID = 2**31
"""Instead of a token id, for a row whose best logit is not a finite number: the model produced NaN or infinity."""

GREEDY_BELOW = 1e-5
"""Temperatures below this value are greedy: dividing by them would exceed the range of float32."""

Threshold = Callable[[mx.array, mx.array], mx.array]


class BatchSampler:
    """Samples tokens for one composition of a batch. Create a new instance when rows join or leave."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        sampled = [(i, s) for i, s in enumerate(samplings) if s.temperature >= GREEDY_BELOW]
        self._sampled = [i for i, _ in sampled]
        self._seeds = [s.seed for _, s in sampled]
        if sampled:
            self._rows = mx.array(self._sampled)
            self._temperatures = mx.array([[s.temperature] for _, s in sampled])
            self._filters = _filters([s for _, s in sampled])

    def __call__(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        """Choose one token per row.

        Args:
            logits: [rows, vocabulary] after logits processors.
            positions: by row, the answer position of the token to choose.

        Returns:
            [rows] token ids or `INVALID`, uint32, unevaluated.
        """
        tokens = mx.argmax(logits, axis=-1)
        if self._sampled:
            tokens[self._rows] = self._sample(logits[self._rows], [positions[i] for i in self._sampled])
        # Only the chosen logit is read: a maximum over the vocabulary would cost as much as the argmax.
        chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        return mx.where(mx.abs(chosen) < mx.inf, tokens, INVALID)  # NaN is not less than anything

    def _sample(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        # Gumbel-max trick: the argmax of log-probability plus Gumbel noise is a sample of the distribution.
        scaled = self._filter(logits.astype(mx.float32)) / self._temperatures
        keys = mx.array([_key(*pair) for pair in zip(self._seeds, positions, strict=True)], dtype=mx.uint32)
        return mx.argmax(scaled + gumbel(keys, logits.shape[-1]), axis=-1)

    def _filter(self, logits: mx.array) -> mx.array:
        if not self._filters:
            return logits
        thresholds = mx.full((logits.shape[0], 1), -mx.inf)
        for each in self._filters:
            threshold = each.threshold(logits[each.rows], each.values)
            thresholds[each.rows] = mx.maximum(thresholds[each.rows], threshold)
        return mx.where(logits < thresholds, -mx.inf, logits)


@dataclass(frozen=True, slots=True)
class _Filter:
    """A filter and the rows that use it.

    Attributes:
        threshold: returns the lowest logit to keep, [rows, 1], from logits [rows, vocabulary] and `values`.
        rows: indices of the rows.
        values: [rows, 1] the option's value.
    """

    threshold: Threshold
    rows: mx.array
    values: mx.array


def _filters(samplings: Sequence[Sampling]) -> list[_Filter]:
    top_p = {i: s.top_p for i, s in enumerate(samplings) if 0 < s.top_p < 1}
    min_p = {i: s.min_p for i, s in enumerate(samplings) if s.min_p > 0}
    top_k: dict[int, float] = {i: s.top_k for i, s in enumerate(samplings) if s.top_k > 0}
    max_k = int(max(top_k.values(), default=0))
    options: list[tuple[Threshold, dict[int, float]]] = [
        (top_p_threshold, top_p),
        (min_p_threshold, min_p),
        (partial(top_k_threshold, max_k=max_k), top_k),
    ]
    return [
        _Filter(threshold, mx.array(list(values)), mx.array(list(values.values()))[:, None])
        for threshold, values in options
        if values
    ]


def top_p_threshold(logits: mx.array, top_p: mx.array) -> mx.array:
    """Return the lowest logit of the smallest set of most likely tokens with a total probability of `top_p`."""
    ordered = mx.sort(logits, axis=-1)
    mass = mx.cumsum(mx.softmax(ordered, axis=-1), axis=-1)
    dropped = mx.sum(mass <= 1 - top_p, axis=-1, keepdims=True)
    # Rounding may leave the whole mass at 1 - top_p. The most likely token is kept even then.
    return mx.take_along_axis(ordered, mx.minimum(dropped, logits.shape[-1] - 1), axis=-1)


def min_p_threshold(logits: mx.array, min_p: mx.array) -> mx.array:
    """Return the logit of a token with `min_p` times the probability of the most likely one."""
    return mx.max(logits, axis=-1, keepdims=True) + mx.log(min_p)


def top_k_threshold(logits: mx.array, top_k: mx.array, *, max_k: int) -> mx.array:
    """Return the logit of the `top_k`-th most likely token; `max_k` is the maximum of `top_k`."""
    max_k = min(max_k, logits.shape[-1])
    best = mx.sort(mx.topk(logits, max_k, axis=-1), axis=-1)
    return mx.take_along_axis(best, max_k - mx.minimum(top_k, max_k).astype(mx.int32), axis=-1)


def valid_ids(tokens: mx.array) -> mx.array:
    """Replace `INVALID` by 0, which models can look up. What they compute for that row is not used."""
    return tokens & (INVALID - 1)


def gumbel(keys: mx.array, size: int) -> mx.array:
    """Return standard Gumbel noise [rows, size]. Each row is a function of its key ([rows, 2] uint32) only."""
    return mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys)


def _key(seed: int, position: int) -> tuple[int, int]:
    """Return the random key of one token of a job. Every bit depends on both arguments."""
    mixed = _mix(_mix(seed) + position)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _mix(number: int) -> int:
    """Apply the finaliser of SplitMix64: a permutation of the 64-bit integers that separates close values."""
    number = (number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31
