"""Limits the number of different adapters in a batch to the number that the runner keeps in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from worker.engine.sequence import Sequence


class AdapterBudget:
    """The slots for adapters of one model. Rows with the same adapter share a slot.

    Args:
        slots: maximum number of different adapters in the batch.
        running: the rows in the batch, in the order of admission.
    """

    def __init__(self, slots: int, running: dict[int, Sequence]) -> None:
        self._slots = max(1, slots)  # without slots, the runner fails rows that name an adapter
        self._running = running

    def in_use(self) -> frozenset[str]:
        """Return the adapters of the rows in the batch."""
        return frozenset(each.request.adapter for each in self._running.values() if each.request.adapter is not None)

    def lacks_slot(self, sequence: Sequence, in_use: Collection[str]) -> bool:
        """Return whether the rows in the batch use all slots, and none of them this row's adapter."""
        adapter = sequence.request.adapter
        return adapter is not None and adapter not in in_use and len(in_use) >= self._slots

    def with_slot(self, waiting: Iterable[Sequence]) -> list[Sequence]:
        """Return the waiting rows that need no slot, or for which there is one."""
        in_use = self.in_use()
        return [each for each in waiting if not self.lacks_slot(each, in_use)]

    def newest_to_preempt(self, urgent: Iterable[Sequence]) -> Sequence | None:
        """Return the newest row of the class `batch` with an adapter if a row of another class lacks a slot."""
        in_use = self.in_use()
        if not any(self.lacks_slot(each, in_use) for each in urgent):
            return None
        rows = reversed(self._running.values())
        return next((each for each in rows if each.is_batch and each.request.adapter is not None), None)
