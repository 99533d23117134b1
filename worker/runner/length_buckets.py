"""Length buckets: rows of similar length decode in a batch of their own.

In a single batch, every row is padded to the longest one, and a long row that joins causes all other rows to be copied
to its length. Each additional bucket, however, costs one more pass over all weights. So a row joins the bucket with the
least padding, provided that a step reads less padding than weights. Otherwise the row gets a new bucket, so a long row
never copies or widens short ones. After rows have left, two buckets are merged once their common padding costs less
than a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

from worker.runner.base import Row, TokenOutput
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import Footprint, KVCache

MERGE_DIVISOR = 2
"""Two buckets are merged if their padding is at most 1/2 of the limit: rows that join later will add some."""


class LengthBuckets:
    """All decoding rows, in one batch per bucket.

    Args:
        make_batch: returns an empty batch.
        footprint: cache memory of a row of this model.
        max_padding_bytes: maximum bytes of padding per bucket.
        batching: which rows may share a bucket.
    """

    def __init__(
        self,
        make_batch: Callable[[], DecodeBatch],
        footprint: Footprint,
        max_padding_bytes: int,
        batching: BatchingSupport = UNRESTRICTED,
    ) -> None:
        self._batching = batching
        self._make_batch = make_batch
        self._footprint = footprint
        self._max_padding_bytes = max_padding_bytes
        self._buckets: list[DecodeBatch] = []
        self._failures: list[tuple[int, Exception]] = []
        self._previous_rows = 0

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    @property
    def lengths(self) -> list[list[int]]:
        """Number of cached tokens of each row, by bucket."""
        return [bucket.lengths for bucket in self._buckets if len(bucket)]

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return sum(bucket.nbytes for bucket in self._buckets)

    def clear(self) -> None:
        """Drop every row and free the caches."""
        self._buckets = []

    def join(self, rows: Sequence[Row], cache: KVCache) -> None:
        """Add rows to one bucket; see `DecodeBatch.join`."""
        self._bucket_for([len(row.prompt) - 1 for row in rows]).join(rows, cache)

    def remove(self, uids: Collection[int]) -> None:
        """Remove rows."""
        for bucket in self._buckets:
            bucket.remove(uids)

    def step(self, *, speculate: bool = False, ahead: bool = True) -> list[TokenOutput]:
        """Run a step of each bucket; see `DecodeBatch.step`.

        Args:
            ahead: leave the tokens of this step on the device until the next one.
        """
        rows = len(self)
        if rows < self._previous_rows:
            self._merge_buckets()
        self._previous_rows = rows
        speculate = speculate and len(self._buckets) == 1
        outputs: list[TokenOutput] = []
        for bucket in self._buckets:
            outputs += bucket.step(speculate=speculate)
        for bucket in self._buckets:
            if not ahead:
                outputs += bucket.read()
            self._failures += bucket.failures
            bucket.failures = []
        self._buckets = [bucket for bucket in self._buckets if len(bucket)]
        return outputs

    def take_failures(self) -> list[tuple[int, Exception]]:
        """Return (uid, error) of the rows that raised and were removed since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def bytes(self, lengths: Sequence[int]) -> int:
        """Return the cache bytes of rows of these lengths, each allocated at the length of its bucket's longest row.

        The estimate groups the rows from the longest on, up to the padding limit. In practice rows join in any order
        and may be grouped differently, with the padding of at most one more bucket.
        """
        if not lengths:
            return 0
        total = padding = longest_filled = row_bytes = 0
        for length in sorted(lengths, reverse=True):
            filled = self._footprint.filled(length)
            padding += longest_filled - filled
            if not total or padding > self._max_padding_bytes:
                padding, longest_filled, row_bytes = 0, filled, self._footprint.allocated(length)
            total += row_bytes
        return min(total + self._max_padding_bytes, len(lengths) * self._footprint.allocated(max(lengths)))

    def _bucket_for(self, lengths: list[int]) -> DecodeBatch:
        """Return the bucket where these rows cause the least padding; a new one if all would exceed the limit."""
        padded = [
            (self._footprint.padding([*bucket.lengths, *lengths]), bucket)
            for bucket in self._buckets
            if self._batching.may_decode(bucket.lengths, lengths)
        ]
        padding, bucket = min(padded, key=lambda pair: pair[0], default=(0, None))
        if bucket is None or padding > self._max_padding_bytes:
            bucket = self._make_batch()
            self._buckets.append(bucket)
        return bucket

    def _merge_buckets(self) -> None:
        """Merge the first two buckets with little enough common padding."""
        self._buckets = [bucket for bucket in self._buckets if len(bucket)]
        for one, other in combinations(self._buckets, 2):
            padding = self._footprint.padding([*one.lengths, *other.lengths])
            if (
                self._batching.may_decode(one.lengths, other.lengths)
                and padding * MERGE_DIVISOR <= self._max_padding_bytes
            ):
                one.absorb(other)
                self._buckets.remove(other)
                return
