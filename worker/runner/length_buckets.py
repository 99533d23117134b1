"""The rows that decode, in lanes: rows of about the same length have a batch of their own.

In one batch every row is padded to the longest, and a row that joins makes all others be copied to its length. A lane
more is a pass more, which reads all weights once more. So a row goes where the padding that a step reads is less than
the weights are, and has a lane of its own where there is no such place: a long row then neither copies nor widens the
short ones. Lanes become one when rows have left and their padding is worth less than a pass.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

from worker.runner import kv_cache as kv
from worker.runner.base import Row
from worker.runner.decode import DecodeBatch
from worker.runner.memory import Footprint
from worker.runner.prefix_cache import PrefixCache
from worker.runner.speculation.verification import Speculation

_WORTH_A_COPY = 2
"""Two lanes become one when their padding is so many times less than what a lane may have: rows come again."""


class Lanes:
    """Rows that have their prompts in the cache.

    Args:
        model: an mlx-lm model.
        prefixes: keeps what rows have in the cache when they leave.
        footprint: of a row of this model.
        most_padding: bytes of padding that cost a step as much as a lane more, which reads all weights again.
        speculation: guesses for a few rows.
    """

    def __init__(
        self, model: Any, prefixes: PrefixCache, footprint: Footprint, most_padding: int, speculation: Speculation
    ) -> None:
        self._model = model
        self._prefixes = prefixes
        self._footprint = footprint
        self._most_padding = most_padding
        self._speculation = speculation
        self._lanes: list[DecodeBatch] = []
        self._rows_before = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens that each row has in the cache, by lane."""
        return [lane.lengths for lane in self._lanes if len(lane)]

    def clear(self) -> None:
        """Drop every row and free the caches."""
        self._lanes = []

    def join(self, rows: Sequence[Row], cache: kv.Layers) -> None:
        """Add rows; `cache` has all but the last token of their prompts, and belongs to their lane from now on."""
        lengths = [len(row.prompt) for row in rows]
        self._lane_for(lengths).join(rows, cache)

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        for lane in self._lanes:
            lane.remove(uids)

    def step(self, *, quiet: bool = False) -> list[tuple[int, int]]:
        """Queue the next token of every row and read the last one of each, lane by lane; see `DecodeBatch.step`.

        Args:
            quiet: whether the device has nothing else to do.
        """
        rows = len(self)
        if rows < self._rows_before:
            self._unite()
        self._rows_before = rows
        tokens = [pair for lane in self._lanes for pair in lane.step(quiet=quiet and len(self._lanes) == 1)]
        self._lanes = [lane for lane in self._lanes if len(lane)]
        return tokens

    def nbytes(self) -> int:
        """Bytes of their caches."""
        return sum(lane.nbytes() for lane in self._lanes)

    def _lane_for(self, lengths: list[int]) -> DecodeBatch:
        """The lane where these rows make the least padding; a new one where all have too much."""
        padded = [(self._padding([*lane.lengths, *lengths]), lane) for lane in self._lanes]
        least, lane = min(padded, key=lambda pair: pair[0], default=(0, None))
        if lane is None or least > self._most_padding:
            lane = DecodeBatch(self._model, self._prefixes, self._speculation)
            self._lanes.append(lane)
        return lane

    def _padding(self, lengths: Collection[int]) -> int:
        """Bytes of padding where rows of these lengths share a batch."""
        longest = self._footprint.filled(max(lengths, default=0))
        return sum(longest - self._footprint.filled(length) for length in lengths)

    def _unite(self) -> None:
        """Make one lane of two where that has become cheaper."""
        self._lanes = [lane for lane in self._lanes if len(lane)]
        for one, other in combinations(self._lanes, 2):
            if self._padding([*one.lengths, *other.lengths]) * _WORTH_A_COPY <= self._most_padding:
                one.absorb(other)
                self._lanes.remove(other)
                return
