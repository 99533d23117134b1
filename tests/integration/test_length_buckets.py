"""Length buckets: which rows share a batch, and what short rows save by that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from tests.support.runner import numbered
from worker.models.load import LoadedModel, load_model
from worker.runner import forward
from worker.runner.base import Row
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import Footprint, KVCache
from worker.runner.length_buckets import LengthBuckets
from worker.runner.prefix.cache import PrefixCache
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.verification import Speculation

PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Cache bytes per token of the tiny model: keys and values, layers, heads, head size, bytes per number."""
MAX_PADDING_BYTES = 550 * PER_TOKEN


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def batches(tiny: LoadedModel) -> LengthBuckets:
    return make_buckets(tiny, MAX_PADDING_BYTES)


def make_buckets(tiny: LoadedModel, max_padding_bytes: int) -> LengthBuckets:
    speculation = Speculation(tiny.model, 0, [NgramProposer()])
    prefixes = PrefixCache(tiny.model, 0)
    return LengthBuckets(
        lambda: DecodeBatch(tiny.model, prefixes, speculation), Footprint.of(tiny.model), max_padding_bytes
    )


def join(batches: LengthBuckets, tiny: LoadedModel, rows: Sequence[Row]) -> None:
    cache = KVCache.empty(tiny.model, len(rows))
    forward.fill(tiny.model, cache, [each.prompt[:-1] for each in rows])
    batches.join(rows, cache)


def lengths(batches: LengthBuckets) -> list[list[int]]:
    """Return the row lengths by bucket, shortest first, rounded to hundreds."""
    return sorted(sorted(round(length, -2) for length in bucket) for bucket in batches.lengths)


def test_a_long_row_neither_widens_nor_copies_short_rows(tiny: LoadedModel, batches: LengthBuckets) -> None:
    join(batches, tiny, [numbered(uid, 100, 50) for uid in range(4)])
    assert [each.uid for _ in range(2) for each in batches.step()] == [0, 1, 2, 3]
    short = batches.nbytes
    join(batches, tiny, [numbered(9, 1200, 50)])
    batches.step()
    assert lengths(batches) == [[100] * 4, [1200]]
    assert {each.uid for each in batches.step()} == {0, 1, 2, 3, 9}
    assert batches.nbytes - short <= 1536 * PER_TOKEN


def test_rows_share_a_bucket_up_to_the_padding_limit(tiny: LoadedModel, batches: LengthBuckets) -> None:
    for uid, length in enumerate((100, 300, 400, 1000, 200, 1100)):
        join(batches, tiny, [numbered(uid, length, 9)])
    assert lengths(batches) == [[100, 300, 400], [200], [1000, 1100]]


def test_buckets_are_merged_when_rows_have_left(tiny: LoadedModel, batches: LengthBuckets) -> None:
    """A long row and the last short row continue in one bucket, and generate the same tokens as single rows."""
    rows = [*(numbered(uid, 300, 4) for uid in range(3)), numbered(3, 300, 20), numbered(4, 560, 20)]
    expected = {each.uid: alone(tiny, each) for each in rows}
    join(batches, tiny, rows[:4])
    join(batches, tiny, rows[4:])
    tokens: dict[int, list[int]] = {each.uid: [] for each in rows}
    seen = []
    while len(batches) or not tokens[4]:
        for each in batches.step():
            tokens[each.uid].append(each.token)
        seen.append(lengths(batches))
    assert tokens == expected
    assert seen[0] == [[300] * 4, [600]]
    assert [300, 600] in seen[8]
    assert batches.nbytes == 0


def alone(tiny: LoadedModel, row: Row) -> list[int]:
    batches = make_buckets(tiny, 0)
    join(batches, tiny, [row])
    tokens: list[int] = []
    while len(tokens) < row.max_new_tokens:
        tokens += [each.token for each in batches.step()]
    return tokens


def test_a_cache_shrinks_when_its_longest_row_has_left(tiny: LoadedModel) -> None:
    """So a batch is never wider than the estimate for its longest row."""
    batches, footprint = make_buckets(tiny, 2**30), Footprint.of(tiny.model)
    join(batches, tiny, [numbered(1, 500, 3), *(numbered(uid, 100 + uid, 200) for uid in range(2, 6))])
    seen = []
    while len(batches) and (outputs := batches.step()) is not None:
        (lengths,) = batches.lengths or [[1]]
        seen.append(batches.nbytes / len(lengths) / footprint.allocated(max(lengths)))
        assert outputs or len(seen) == 1
    assert len(seen) > 200
    assert max(seen[1:4]) == max(seen) == 1.0
