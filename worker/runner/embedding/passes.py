"""Chooses which inputs of which rows share the next pass. Knows no MLX.

Inputs of about the same length share a pass, so little of it is padding. Rows take turns in choosing the length, so a
row with one input does not wait until a row with a thousand inputs has ended.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from shared.jobs.inputs import Input
from worker.runner.base import Row, RowInputs

_MIN_SHARE: Final = 0.5
"""An input shares a pass with a longest input of at most twice its length."""


class Item(NamedTuple):
    """An input to compute.

    Attributes:
        uid: the row.
        number: the index of the input.
    """

    uid: int
    number: int
    input: Input


@dataclass(slots=True)
class PendingRow:
    """A row whose inputs are not all computed.

    Attributes:
        pending: indices of the inputs that are not in a pass yet, shortest first.
    """

    row: Row
    inputs: RowInputs
    pending: list[int]

    @classmethod
    def of(cls, row: Row) -> PendingRow:
        """Return a row with the inputs that no earlier attempt has computed."""
        work = row.inputs or RowInputs((), set())
        return cls(row, work, sorted(work.pending, key=lambda index: len(work.inputs[index].tokens)))

    def length(self, index: int) -> int:
        """Return the number of tokens of an input."""
        return len(self.inputs.inputs[index].tokens)

    @property
    def remaining(self) -> int:
        """Tokens of the remaining inputs."""
        return sum(map(self.length, self.pending))

    def take(self, max_length: int, min_length: int, count: int) -> list[Item]:
        """Take up to `count` inputs between two lengths, longest first."""
        lengths = [*map(self.length, self.pending)]
        end = bisect_right(lengths, max_length)
        begin = max(bisect_left(lengths, min_length, hi=end), end - count)
        taken = [Item(self.row.uid, index, self.inputs.inputs[index]) for index in self.pending[begin:end]]
        del self.pending[begin:end]
        return taken


def next_pass(rows: Sequence[PendingRow], max_tokens: int) -> list[Item]:
    """Take the inputs of the next pass from rows.

    Args:
        rows: in the order in which they choose; the first has the longest input of the pass.
        max_tokens: of the pass, padding included. A single input may be longer.
    """
    waiting = [row for row in rows if row.pending]
    if not waiting:
        return []
    longest = waiting[0].length(waiting[0].pending[-1])
    count = max(1, max_tokens // longest)
    items: list[Item] = []
    for row in waiting:
        items += row.take(longest, int(longest * _MIN_SHARE), count - len(items))
        if len(items) == count:
            break
    return items
