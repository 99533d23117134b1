"""What proposes draft tokens: n-grams of the row's own text; a draft model or extra heads can follow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from worker.runner.decode_row import DecodeRow


class Proposer(Protocol):
    """Proposes the next tokens of rows. Keeps state per row until `drop`."""

    def expected(self, rows: Sequence[DecodeRow], most: int) -> list[list[float]]:
        """How many draft tokens of each row will be accepted when 1, 2, …, `most` are drafted.

        Called once or twice per step, so the work per row must be bounded, however long the row is.

        Returns:
            By row; empty where it has no draft.
        """
        ...

    def propose(self, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """`length` draft tokens per row; empty where there is no draft. Rows have not changed since `expected`."""
        ...

    def drop(self, uids: Collection[int]) -> None:
        """Drop what it knows of rows."""
        ...
