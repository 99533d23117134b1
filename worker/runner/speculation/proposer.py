"""The interface of proposers. `ngram` and `draft_model` implement it; additional heads could implement it as well."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from worker.runner.decode_row import DecodeRow


class Proposer(Protocol):
    """Proposes draft tokens for rows. Keeps state per row until `drop`."""

    def expected(self, rows: Sequence[DecodeRow], max_length: int) -> list[list[float]]:
        """Return, by row, the expected number of accepted tokens for drafts of 1, 2, …, `max_length` tokens.

        Called once or twice per step, so the work per row must be bounded regardless of the row's length.

        Returns:
            By row; empty for a row without a draft.
        """
        ...

    def seconds(self, rows: int, length: int) -> float:  # noqa: ARG002
        """Return the seconds that drafting takes, on the scale of `PassCost`."""
        return 0.0

    def prepare(self, rows: Sequence[DecodeRow]) -> bool:  # noqa: ARG002
        """Do work that `propose` needs, within the time of about a step. Returns whether `propose` can be called."""
        return True

    def record(self, drafted: int, accepted: int) -> None:  # noqa: ARG002
        """Take note of how many draft tokens of a row were accepted."""
        return None  # noqa: RET501 - mypy takes an empty body for an abstract method

    def propose(self, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        """Return `length` draft tokens by row; empty for a row without a draft. Call `expected` for the rows first."""
        ...

    def drop(self, uids: Collection[int]) -> None:
        """Drop the state of rows."""
        ...
