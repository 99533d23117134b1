"""Log-probabilities of the sampled tokens and of the most likely alternatives, for the rows that ask for them.

They are natural logarithms in the model's own distribution: before penalties, temperature and filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import mlx.core as mx

from worker.runner.base import Row

MAX_ALTERNATIVES = 20

Logprob: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]
"""The sampled token's log-probability, and the alternatives as (token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class QueuedLogprobs:
    """Log-probabilities that the device is computing for the rows that ask for them.

    Attributes:
        rows: (uid, number of alternatives) of each row.
        chosen: [rows] log-probabilities of the sampled tokens.
        ids: [rows, alternatives] ids of the most likely tokens, unordered; None if no row asks for alternatives.
        best: [rows, alternatives] log-probabilities of these tokens; None like `ids`.
    """

    rows: list[tuple[int, int]]
    chosen: mx.array
    ids: mx.array | None = None
    best: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [self.chosen, *([] if self.ids is None or self.best is None else [self.ids, self.best])]

    def read(self) -> Mapping[int, Logprob]:
        """Wait for the device and return the log-probabilities by uid."""
        chosen = cast("list[float]", self.chosen.tolist())
        if self.ids is None or self.best is None:
            return {uid: (value, ()) for (uid, _), value in zip(self.rows, chosen, strict=True)}
        ids, best = cast("list[list[int]]", self.ids.tolist()), cast("list[list[float]]", self.best.tolist())
        return {
            uid: (value, tuple(sorted(zip(*line, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]))
            for (uid, count), value, *line in zip(self.rows, chosen, ids, best, strict=True)
        }


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
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logits, tokens[self._indices][:, None], axis=-1) - total
        if not self._alternatives:
            return QueuedLogprobs(self._rows, chosen[:, 0])
        count = min(self._alternatives, logits.shape[-1])
        ids = mx.argpartition(logits, -count, axis=-1)[:, -count:]
        return QueuedLogprobs(self._rows, chosen[:, 0], ids, mx.take_along_axis(logits, ids, axis=-1) - total)
