"""The choice of every row's next token, for the whole batch at once.

What a row costs depends on what it asks for: greedy rows share one argmax, and only the rows that draw pay for
noise, and of those only the ones with a filter pay for that filter.

The filters mean what they mean in `mlx_lm.sample_utils.make_sampler`: top_p and min_p look at the probabilities
before the temperature, and each of the three keeps the best tokens down to some edge. So the order they are applied
in does not matter, and the highest edge decides. Tokens that tie at the edge all stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from shared.jobs.request import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would leave the range of float32."""

Edge = Callable[[mx.array, mx.array], mx.array]


class BatchSampler:
    """Chooses tokens for one composition of the batch; make a new one when rows come or go."""

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        drawing = [(i, s) for i, s in enumerate(samplings) if s.temperature >= GREEDY_BELOW]
        self._drawing = [i for i, _ in drawing]
        self._seeds = [s.seed for _, s in drawing]
        if drawing:
            self._rows = mx.array(self._drawing)
            self._temperatures = mx.array([[s.temperature] for _, s in drawing])
            self._filters = _filters([s for _, s in drawing])

    def __call__(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        """Choose one token a row.

        Args:
            logits: [rows, vocabulary], penalties applied.
            positions: of each row, how many tokens of its answer come before the one chosen now.

        Returns:
            [rows] token ids, uint32, not evaluated.
        """
        tokens = mx.argmax(logits, axis=-1)
        if self._drawing:
            tokens[self._rows] = self._draw(logits[self._rows], [positions[i] for i in self._drawing])
        return tokens

    def _draw(self, logits: mx.array, positions: Sequence[int]) -> mx.array:
        # Gumbel-max: the argmax of log-probability plus Gumbel noise is a draw from the distribution.
        scaled = self._narrow(logits.astype(mx.float32)) / self._temperatures
        keys = mx.array([_key(*pair) for pair in zip(self._seeds, positions, strict=True)], dtype=mx.uint32)
        return mx.argmax(scaled + gumbel(keys, logits.shape[-1]), axis=-1)

    def _narrow(self, logits: mx.array) -> mx.array:
        if not self._filters:
            return logits
        edges = mx.full((logits.shape[0], 1), -mx.inf)
        for each in self._filters:
            edges[each.rows] = mx.maximum(edges[each.rows], each.edge(logits[each.rows], each.values))
        return mx.where(logits < edges, -mx.inf, logits)


@dataclass(frozen=True, slots=True)
class _Filter:
    """A filter and the rows that use it; `edge(logits, values)` is the lowest logit that stays, [rows, 1]."""

    edge: Edge
    rows: mx.array
    values: mx.array


def _filters(samplings: Sequence[Sampling]) -> list[_Filter]:
    def using(edge: Edge, values: dict[int, float]) -> list[_Filter]:
        column = mx.array(list(values.values()))[:, None] if values else None
        return [] if column is None else [_Filter(edge, mx.array(list(values)), column)]

    top_k: dict[int, float] = {i: s.top_k for i, s in enumerate(samplings) if s.top_k > 0}
    return [
        *using(top_p_edge, {i: s.top_p for i, s in enumerate(samplings) if 0 < s.top_p < 1}),
        *using(min_p_edge, {i: s.min_p for i, s in enumerate(samplings) if s.min_p > 0}),
        *using(partial(top_k_edge, most=int(max(top_k.values(), default=0))), top_k),
    ]


def top_p_edge(logits: mx.array, top_p: mx.array) -> mx.array:
    """Keeps the fewest best tokens that together have the probability `top_p`."""
    ordered = mx.sort(logits, axis=-1)
    mass = mx.cumsum(mx.softmax(ordered, axis=-1), axis=-1)
    dropped = mx.sum(mass <= 1 - top_p, axis=-1, keepdims=True)
    # Rounding may leave the whole mass at 1 - top_p; the best token stays all the same.
    return mx.take_along_axis(ordered, mx.minimum(dropped, logits.shape[-1] - 1), axis=-1)


def min_p_edge(logits: mx.array, min_p: mx.array) -> mx.array:
    """Keeps tokens with at least `min_p` times the probability of the best."""
    return mx.max(logits, axis=-1, keepdims=True) + mx.log(min_p)


def top_k_edge(logits: mx.array, top_k: mx.array, *, most: int) -> mx.array:
    """Keeps the `top_k` best tokens; `most` is the largest of them."""
    most = min(most, logits.shape[-1])
    best = mx.sort(mx.topk(logits, most, axis=-1), axis=-1)
    return mx.take_along_axis(best, most - mx.minimum(top_k, most).astype(mx.int32), axis=-1)


def gumbel(keys: mx.array, size: int) -> mx.array:
    """Standard Gumbel noise [rows, size]; a row of it is a function of its key alone ([rows, 2] uint32)."""
    return mx.vmap(lambda key: mx.random.gumbel((size,), key=key))(keys)


def _key(seed: int, position: int) -> tuple[int, int]:
    """The random key of one token of one job: every bit depends on both arguments."""
    mixed = _mix(_mix(seed) + position)
    return mixed >> 32, mixed & 0xFFFFFFFF


def _mix(number: int) -> int:
    """The finaliser of SplitMix64: a permutation of the 64-bit numbers that scatters neighbours."""
    number = (number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31
