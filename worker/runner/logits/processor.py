"""Logits processors: change the logits of individual rows before sampling.

A processor handles all rows of a batch that use it in one call. If that call raises, each of these rows is processed
separately, and only the rows that raise again fail.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import mlx.core as mx

from shared.jobs.request import Request
from worker.runner.base import Row

logger = logging.getLogger(__name__)

RowFailures: TypeAlias = list[tuple[int, Exception]]
"""(batch index, error) of rows whose processors raised."""


class BatchProcessor(Protocol):
    """A processor for one composition of a batch."""

    def __call__(self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
        """Return the changed logits.

        Args:
            logits: [rows, vocabulary] of the rows that it was prepared for.
            last: [rows] newest token of each row. It may be unevaluated. Use it lazily: reading its value would make
                the host wait for the device.
            history: tokens before the newest one, by row, including the prompt, oldest first.
        """
        ...


class LogitsProcessor(Protocol):
    """One type of processor, for all rows of a model."""

    def applies_to(self, request: Request) -> bool:
        """Return whether a request uses this processor."""
        ...

    def prepare(self, rows: Sequence[Row]) -> BatchProcessor:
        """Return the processor for these rows, all of which use it. Called whenever rows join or leave the batch."""
        ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    processor: LogitsProcessor
    rows: Sequence[Row]
    indices: list[int]
    index_array: mx.array
    batch: BatchProcessor

    def replaced(self, logits: mx.array, changed: mx.array) -> mx.array:
        """Return the logits of the batch with those of this processor's rows replaced."""
        count = logits.shape[0]
        if len(self.indices) == count:
            return changed
        # On a CPU, a scatter of rows takes ten times as long as this gather.
        order = list(range(count))
        for position, index in enumerate(self.indices):
            order[index] = count + position
        return mx.concatenate([logits, changed])[mx.array(order)]


class LogitsPipeline:
    """All processors of one composition of a batch. Rows without processors cost nothing.

    Args:
        processors: in the order in which they are applied.
        rows: by batch index; None: empty.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], rows: Sequence[Row | None]) -> None:
        self._prepared: list[_Prepared] = []
        self._unprepared: RowFailures = []
        for processor in processors:
            self._prepare(
                processor, [(i, row) for i, row in enumerate(rows) if row and processor.applies_to(row.request)]
            )

    def __bool__(self) -> bool:
        """Return whether any row uses a processor."""
        return bool(self._prepared or self._unprepared)

    def __call__(
        self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]
    ) -> tuple[mx.array, RowFailures]:
        """Apply all processors.

        Args:
            logits: [batch, vocabulary].
            last: [batch]; see `BatchProcessor`.
            history: by batch index; see `BatchProcessor`.

        Returns:
            [batch, vocabulary] changed logits, and the rows that raised; ignore the logits of these rows.
        """
        failures, self._unprepared = self._unprepared, []
        for each in self._prepared:
            histories = [history[index] for index in each.indices]
            try:
                changed = each.batch(logits[each.index_array], last[each.index_array], histories)
            except Exception:  # noqa: BLE001 - a processor may raise anything; the rows are retried separately
                changed, failed = _one_by_one(each, logits, last, histories)
                failures += failed
            logits = each.replaced(logits, changed)
        return logits, failures

    def _prepare(self, processor: LogitsProcessor, users: Sequence[tuple[int, Row]]) -> None:
        if not users:
            return
        try:
            batch = processor.prepare([row for _, row in users])
        except Exception:
            good = [user for user in users if not self._raises(processor, *user)]
            if len(good) == len(users):
                raise
            self._prepare(processor, good)
            return
        indices, rows = [index for index, _ in users], [row for _, row in users]
        self._prepared.append(_Prepared(processor, rows, indices, mx.array(indices), batch))

    def _raises(self, processor: LogitsProcessor, index: int, row: Row) -> bool:
        try:
            processor.prepare([row])
        except Exception as error:  # noqa: BLE001 - fails this row only
            self._unprepared.append((index, error))
            return True
        return False


def _one_by_one(
    each: _Prepared, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]
) -> tuple[mx.array, RowFailures]:
    """Apply a processor to each row separately. Returns the logits of all its rows, and the rows that raised."""
    changed, failures = [], []
    for row, index, tokens in zip(each.rows, each.indices, history, strict=True):
        row_logits = logits[index : index + 1]
        try:
            row_logits = each.processor.prepare([row])(row_logits, last[index : index + 1], [tokens])
        except Exception as error:
            logger.warning("logits_processor_failed", exc_info=error)
            failures.append((index, error))
        changed.append(row_logits)
    return mx.concatenate(changed), failures
