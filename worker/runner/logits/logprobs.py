"""Log-probabilities of the sampled tokens and of the most likely alternatives, for the rows that ask for them.

They are natural logarithms in the model's own distribution: before penalties, temperature and filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np

from worker.runner.base import Row

MAX_ALTERNATIVES = 20

_BLOCK = 64
"""Tokens per block when the most likely tokens are searched: first the best blocks, then the best tokens in them. For
49,152 tokens this takes a CPU a tenth of the time of a partition of all tokens."""

Logprob: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]
"""The sampled token's log-probability, and the alternatives as (token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class QueuedLogprobs:
    """Log-probabilities that the device is computing for the rows that ask for them.

    Attributes:
        rows: (uid, number of alternatives) of each row.
        chosen: [rows] logits of the sampled tokens.
        normaliser: [rows] logarithms of the sum of all exponentiated logits; or [rows, vocabulary] the logits.
        ids: [rows, alternatives] ids of the most likely tokens, unordered; None if no row asks for alternatives.
        best: [rows, alternatives] logits of these tokens; None like `ids`.
    """

    rows: list[tuple[int, int]]
    chosen: mx.array
    normaliser: mx.array
    ids: mx.array | None = None
    best: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate."""
        top = [] if self.ids is None or self.best is None else [self.ids, self.best]
        return [self.chosen, self.normaliser, *top]

    def read(self) -> Mapping[int, Logprob]:
        """Wait for the device and return the log-probabilities by uid."""
        total = self._total()
        chosen = cast("list[float]", (np.array(self.chosen) - total).tolist())
        if self.ids is None or self.best is None:
            return {uid: (value, ()) for (uid, _), value in zip(self.rows, chosen, strict=True)}
        ids, best = cast("list[list[int]]", self.ids.tolist()), (np.array(self.best) - total[:, None]).tolist()
        return {
            uid: (value, tuple(sorted(zip(*line, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]))
            for (uid, count), value, *line in zip(self.rows, chosen, ids, best, strict=True)
        }

    def _total(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        values = np.array(self.normaliser, copy=False)
        if values.ndim == 1:
            return values
        # On a CPU, MLX takes five times as long as NumPy for an exponential.
        highest = values.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # NaN and infinity fail their row
            total: np.ndarray[Any, np.dtype[np.float32]] = np.log(np.exp(values - highest).sum(axis=-1)) + highest[:, 0]
        return total


class BatchLogprobs:
    """Computes log-probabilities for one composition of a batch.

    Args:
        rows: by batch index; None: empty.
    """

    def __init__(self, rows: Sequence[Row | None]) -> None:
        requested = [(i, row, row.request.logprobs) for i, row in enumerate(rows) if row]
        counted = [(i, row.uid, min(count, MAX_ALTERNATIVES)) for i, row, count in requested if count is not None]
        self._rows = [(uid, count) for _, uid, count in counted]
        self._alternatives = max((count for _, count in self._rows), default=0)
        self._indices = mx.array([index for index, _, _ in counted]) if counted else None

    def __bool__(self) -> bool:
        """Return whether any row asks for log-probabilities."""
        return self._indices is not None

    def select(self, logits: mx.array) -> mx.array | None:
        """Copy the logits of the rows that ask for log-probabilities, before processors change them.

        Args:
            logits: [batch, vocabulary].

        Returns:
            [rows, vocabulary]; None if no row asks.
        """
        return None if self._indices is None else logits[self._indices]

    def queue(self, selected: mx.array, tokens: mx.array) -> QueuedLogprobs:
        """Compute the log-probabilities lazily.

        Args:
            selected: what `select` returned.
            tokens: [batch] sampled token ids; need not be evaluated.
        """
        logits = selected.astype(mx.float32)
        on_host = mx.default_device() == mx.cpu
        normaliser = logits if on_host else mx.logsumexp(logits, axis=-1)
        chosen = mx.take_along_axis(logits, tokens[self._indices][:, None], axis=-1)[:, 0]
        if not self._alternatives:
            return QueuedLogprobs(self._rows, chosen, normaliser)
        ids = most_likely(logits, min(self._alternatives, logits.shape[-1]))
        return QueuedLogprobs(self._rows, chosen, normaliser, ids, mx.take_along_axis(logits, ids, axis=-1))


def most_likely(logits: mx.array, count: int) -> mx.array:
    """Return the ids of the tokens with the highest logits, [rows, count], unordered.

    Args:
        logits: [rows, vocabulary].
    """
    rows, vocabulary = logits.shape
    blocks = vocabulary // _BLOCK
    if blocks <= count:
        return mx.argpartition(logits, -count, axis=-1)[:, -count:]
    # The best tokens are in the blocks with the highest maxima, or in the incomplete block at the end.
    highest = mx.max(logits[:, : blocks * _BLOCK].reshape(rows, blocks, _BLOCK), axis=-1)
    best_blocks = mx.argpartition(highest, -count, axis=-1)[:, -count:]
    ids = (best_blocks[:, :, None] * _BLOCK + mx.arange(_BLOCK)).reshape(rows, count * _BLOCK)
    last = mx.broadcast_to(mx.arange(blocks * _BLOCK, vocabulary), (rows, vocabulary - blocks * _BLOCK))
    ids = mx.concatenate([ids, last.astype(ids.dtype)], axis=-1)
    best = mx.argpartition(mx.take_along_axis(logits, ids, axis=-1), -count, axis=-1)[:, -count:]
    return mx.take_along_axis(ids, best, axis=-1)
