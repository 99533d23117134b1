"""Log-probabilities of sampled tokens and of the most likely alternatives, for the rows that ask for them.

They are those of the model's own distribution: before penalties, temperature and filters, as natural logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import mlx.core as mx

from worker.runner.base import Row

MOST_ALTERNATIVES = 20

Logprob: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]
"""Of the token, and the alternatives (token id, logprob), best first."""


@dataclass(frozen=True, slots=True)
class QueuedLogprobs:
    """Log-probabilities that the device computes.

    Attributes:
        rows: which row each line is of, by uid, and how many alternatives it asked for.
        chosen: [lines] of the sampled tokens.
        ids, best: [lines, alternatives] of the most likely tokens, in any order; None where no row asked.
    """

    rows: list[tuple[int, int]]
    chosen: mx.array
    ids: mx.array | None = None
    best: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What to evaluate."""
        return [self.chosen, *([] if self.ids is None or self.best is None else [self.ids, self.best])]

    def read(self) -> Mapping[int, Logprob]:
        """By uid; waits for the device."""
        chosen = cast("list[float]", self.chosen.tolist())
        if self.ids is None or self.best is None:
            return {uid: (value, ()) for (uid, _), value in zip(self.rows, chosen, strict=True)}
        ids, best = cast("list[list[int]]", self.ids.tolist()), cast("list[list[float]]", self.best.tolist())
        return {
            uid: (value, tuple(sorted(zip(*line, strict=True), key=lambda pair: (-pair[1], pair[0]))[:most]))
            for (uid, most), value, *line in zip(self.rows, chosen, ids, best, strict=True)
        }


class BatchLogprobs:
    """The rows of one composition of a batch that ask for log-probabilities.

    Args:
        rows: by place; None where a place has no row.
    """

    def __init__(self, rows: Sequence[Row | None]) -> None:
        asking = [(i, row, row.request.logprobs) for i, row in enumerate(rows) if row]
        counted = [(i, row.uid, min(most, MOST_ALTERNATIVES)) for i, row, most in asking if most is not None]
        self._rows = [(uid, most) for _, uid, most in counted]
        self._most = max((most for _, most in self._rows), default=0)
        self._places = mx.array([place for place, _, _ in counted]) if counted else None

    def __bool__(self) -> bool:
        """Whether any row asks."""
        return self._places is not None

    def select(self, logits: mx.array) -> mx.array | None:
        """[lines, vocabulary] of the rows that ask, before anything changes the logits; None when no row asks."""
        return None if self._places is None else logits[self._places]

    def queue(self, selected: mx.array, tokens: mx.array) -> QueuedLogprobs:
        """Log-probabilities of tokens ([places], not evaluated) by what `select` gave. Nothing is computed yet."""
        logits = selected.astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logits, tokens[self._places][:, None], axis=-1) - total
        if not self._most:
            return QueuedLogprobs(self._rows, chosen[:, 0])
        most = min(self._most, logits.shape[-1])
        ids = mx.argpartition(logits, -most, axis=-1)[:, -most:]
        return QueuedLogprobs(self._rows, chosen[:, 0], ids, mx.take_along_axis(logits, ids, axis=-1) - total)
