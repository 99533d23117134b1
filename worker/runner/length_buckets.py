"""Length buckets: rows of about the same length decode in a batch of their own.

In one batch every row is padded to the longest, and a row that joins makes all others be copied to its length. One more
bucket is one more pass, which reads all weights once more. So a row joins the bucket where the padding that a step
reads is less than the weights are, and gets one of its own where there is none: a long row then neither copies nor
widens the short ones. Two buckets become one when rows have left and the padding is worth less than a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

from worker.runner.base import Row, TokenOutput
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import Footprint, KVCache

WORTH_A_COPY = 2
"""Two buckets are merged when their padding would be at most 1/2 of the limit, because new rows will add some."""


class LengthBuckets:
    """Rows that have their prompts in the cache.

    Args:
        make_batch: makes an empty bucket.
        footprint: of a row of this model.
        most_padding: bytes of padding that a bucket may have.
    """

    def __init__(self, make_batch: Callable[[], DecodeBatch], footprint: Footprint, most_padding: int) -> None:
        self._make_batch = make_batch
        self._footprint = footprint
        self._most_padding = most_padding
        self._buckets: list[DecodeBatch] = []
        self._failures: list[tuple[int, Exception]] = []
        self._rows_before = 0

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens that each row has in the cache, by bucket."""
        return [bucket.lengths for bucket in self._buckets if len(bucket)]

    @property
    def nbytes(self) -> int:
        """Bytes of their caches."""
        return sum(bucket.nbytes for bucket in self._buckets)

    def clear(self) -> None:
        """Drop every row and free the caches."""
        self._buckets = []

    def join(self, rows: Sequence[Row], cache: KVCache) -> None:
        """Add rows; `cache` has all but the last token of their prompts, and belongs to their bucket from now on."""
        self._bucket_for([len(row.prompt) for row in rows]).join(rows, cache)

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows."""
        for bucket in self._buckets:
            bucket.remove(uids)

    def step(self, *, speculate: bool = False) -> list[TokenOutput]:
        """Queue the next token of every row and read the last one of each, bucket by bucket; see `DecodeBatch.step`."""
        rows = len(self)
        if rows < self._rows_before:
            self._unite()
        self._rows_before = rows
        alone = speculate and len(self._buckets) == 1
        outputs: list[TokenOutput] = []
        for bucket in self._buckets:
            outputs += bucket.step(speculate=alone)
            self._failures += bucket.failures
            bucket.failures = []
        self._buckets = [bucket for bucket in self._buckets if len(bucket)]
        return outputs

    def take_failures(self) -> list[tuple[int, Exception]]:
        """(uid, error) of rows that raised and were dropped since this was asked last."""
        failures, self._failures = self._failures, []
        return failures

    def bytes(self, lengths: Sequence[int]) -> int:
        """Bytes of cache that rows of these lengths take, each at the length of the longest row of its bucket.

        They are grouped from the longest on, as far as a bucket may have padding. Rows join in any order and may be
        grouped otherwise, with the padding of one more bucket at most.
        """
        if not lengths:
            return 0
        total = padding = widest = width = 0
        for length in sorted(lengths, reverse=True):
            filled = self._footprint.filled(length)
            padding += widest - filled
            if not total or padding > self._most_padding:
                padding, widest, width = 0, filled, self._footprint.allocated(length)
            total += width
        return min(total + self._most_padding, len(lengths) * self._footprint.allocated(max(lengths)))

    def _bucket_for(self, lengths: list[int]) -> DecodeBatch:
        """The bucket where these rows make the least padding; a new one where all have too much."""
        padded = [(self._footprint.padding([*bucket.lengths, *lengths]), bucket) for bucket in self._buckets]
        least, bucket = min(padded, key=lambda pair: pair[0], default=(0, None))
        if bucket is None or least > self._most_padding:
            bucket = self._make_batch()
            self._buckets.append(bucket)
        return bucket

    def _unite(self) -> None:
        """Make one bucket of two where that has become cheaper."""
        self._buckets = [bucket for bucket in self._buckets if len(bucket)]
        for one, other in combinations(self._buckets, 2):
            if self._footprint.padding([*one.lengths, *other.lengths]) * WORTH_A_COPY <= self._most_padding:
                one.absorb(other)
                self._buckets.remove(other)
                return
