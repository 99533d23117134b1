"""Logit bias: adds a value to the logits of chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shared.jobs.request import Request
from worker.runner.base import Row


class LogitBias:
    """See `worker.runner.logits.processor.LogitsProcessor`."""

    def applies_to(self, request: Request) -> bool:
        """Return whether a request has a logit bias."""
        return bool(request.logit_bias)

    def prepare(self, rows: Sequence[Row]) -> BatchBias:
        """Return the biases of these rows."""
        return BatchBias([row.request.logit_bias for row in rows])


class BatchBias:
    """The biases of rows that all have one. Create a new instance when rows join or leave."""

    def __init__(self, biases: Sequence[Sequence[tuple[int, float]]]) -> None:
        self._rows = mx.array([row for row, bias in enumerate(biases) for _ in bias])
        self._tokens = mx.array([token for bias in biases for token, _ in bias])
        self._values = mx.array([value for bias in biases for _, value in bias])

    def __call__(self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:  # noqa: ARG002
        """See `worker.runner.logits.processor.BatchProcessor`."""
        changed: mx.array = logits.at[self._rows, self._tokens].add(self._values.astype(logits.dtype))
        return changed
