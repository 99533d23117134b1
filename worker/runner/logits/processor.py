"""Logits processors: changes to the logits of single rows before their tokens are sampled.

A processor serves all rows of a batch that ask for it in one call. When that call raises, each of its rows is tried
alone, and only those that raise then fail.
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
"""Places in the batch, and what was raised there."""


class BatchProcessor(Protocol):
    """A processor for one composition of rows."""

    def __call__(self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
        """Return the changed logits.

        Args:
            logits: [rows, vocabulary] of the rows that it was made for.
            last: [rows] the newest token of each row. It may not be evaluated yet: using it lazily keeps the host ahead
                of the device, reading it does not.
            history: of each row the tokens before the newest, prompt included, oldest first.
        """
        ...


class LogitsProcessor(Protocol):
    """One kind of change, for all rows of a model."""

    def wanted(self, request: Request) -> bool:
        """Whether a request asks for it."""
        ...

    def prepare(self, rows: Sequence[Row]) -> BatchProcessor:
        """Make it ready for these rows, all of which want it. Called whenever the rows of a batch change."""
        ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    processor: LogitsProcessor
    rows: Sequence[Row]
    places: list[int]
    indices: mx.array
    batch: BatchProcessor


class LogitsPipeline:
    """All processors of one composition of a batch. Rows without processors cost nothing.

    Args:
        processors: in the order in which they are applied.
        rows: by place; None where a place has no row.
    """

    def __init__(self, processors: Sequence[LogitsProcessor], rows: Sequence[Row | None]) -> None:
        self._prepared: list[_Prepared] = []
        self._unprepared: RowFailures = []
        for processor in processors:
            self._prepare(processor, [(i, row) for i, row in enumerate(rows) if row and processor.wanted(row.request)])

    def __bool__(self) -> bool:
        """Whether any row has a processor."""
        return bool(self._prepared or self._unprepared)

    def __call__(
        self, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]
    ) -> tuple[mx.array, RowFailures]:
        """Apply all of them.

        Args:
            logits: [places, vocabulary].
            last: [places].
            history: by place.

        Returns:
            [places, vocabulary], and the rows that raised, whose logits are of no use.
        """
        failures, self._unprepared = self._unprepared, []
        for each in self._prepared:
            before = [history[place] for place in each.places]
            try:
                changed = each.batch(logits[each.indices], last[each.indices], before)
            except Exception:  # noqa: BLE001 - a processor may raise anything; which row it was is found below
                changed, failed = _one_by_one(each, logits, last, before)
                failures += failed
            logits[each.indices] = changed
        return logits, failures

    def _prepare(self, processor: LogitsProcessor, wanting: Sequence[tuple[int, Row]]) -> None:
        if not wanting:
            return
        try:
            batch = processor.prepare([row for _, row in wanting])
        except Exception:
            good = [each for each in wanting if not self._raises(processor, *each)]
            if len(good) == len(wanting):
                raise
            self._prepare(processor, good)
            return
        places, rows = [place for place, _ in wanting], [row for _, row in wanting]
        self._prepared.append(_Prepared(processor, rows, places, mx.array(places), batch))

    def _raises(self, processor: LogitsProcessor, place: int, row: Row) -> bool:
        try:
            processor.prepare([row])
        except Exception as error:  # noqa: BLE001 - it is this row's own
            self._unprepared.append((place, error))
            return True
        return False


def _one_by_one(
    each: _Prepared, logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]
) -> tuple[mx.array, RowFailures]:
    """The changed logits of all rows of a processor that can be processed, and those that cannot."""
    changed, failures = [], []
    for row, place, before in zip(each.rows, each.places, history, strict=True):
        mine = logits[place : place + 1]
        try:
            mine = each.processor.prepare([row])(mine, last[place : place + 1], [before])
        except Exception as error:
            logger.warning("logits_processor_failed", exc_info=error)
            failures.append((place, error))
        changed.append(mine)
    return mx.concatenate(changed), failures
