"""Rows of different lengths beside each other: which share a batch, and what that spares the short ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from tests.support.runner import row as row_of
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
"""Bytes of the tiny model's cache: keys and values, layers, heads, width, bytes of a number."""
MOST_PADDING = 550 * PER_TOKEN


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def batches(tiny: LoadedModel) -> LengthBuckets:
    return made(tiny, MOST_PADDING)


def made(tiny: LoadedModel, max_padding_bytes: int) -> LengthBuckets:
    speculation = Speculation(tiny.model, 0, NgramProposer())
    prefixes = PrefixCache(tiny.model, 0)
    return LengthBuckets(lambda: DecodeBatch(tiny.model, prefixes, speculation), Footprint.of(tiny.model), max_padding_bytes)


def row(uid: int, length: int, most: int) -> Row:
    return row_of(uid, [(uid * 977 + i * 131) % 40_000 + 100 for i in range(length)], most)


def join(batches: LengthBuckets, tiny: LoadedModel, rows: Sequence[Row]) -> None:
    cache = KVCache.empty(tiny.model, len(rows))
    forward.fill(tiny.model, cache, [each.prompt[:-1] for each in rows])
    batches.join(rows, cache)


def lengths(batches: LengthBuckets) -> list[list[int]]:
    """By bucket, shortest first, to the hundred."""
    return sorted(sorted(round(length, -2) for length in bucket) for bucket in batches.lengths)


def test_a_long_row_neither_widens_nor_copies_the_short_ones(tiny: LoadedModel, batches: LengthBuckets) -> None:
    join(batches, tiny, [row(uid, 100, 50) for uid in range(4)])
    assert [each.uid for _ in range(2) for each in batches.step()] == [0, 1, 2, 3]
    short = batches.nbytes
    join(batches, tiny, [row(9, 1200, 50)])
    batches.step()
    assert lengths(batches) == [[100] * 4, [1200]]
    assert {each.uid for each in batches.step()} == {0, 1, 2, 3, 9}
    assert batches.nbytes - short <= 1536 * PER_TOKEN


def test_rows_share_a_bucket_as_long_as_its_padding_is_worth_less_than_a_pass(
    tiny: LoadedModel, batches: LengthBuckets
) -> None:
    for uid, length in enumerate((100, 300, 400, 1000, 200, 1100)):
        join(batches, tiny, [row(uid, length, 9)])
    assert lengths(batches) == [[100, 300, 400], [200], [1000, 1100]]


def test_buckets_unite_when_rows_have_left(tiny: LoadedModel, batches: LengthBuckets) -> None:
    """A long row and the last of the short ones go on in one bucket, and say what they would have said alone."""
    rows = [*(row(uid, 300, 4) for uid in range(3)), row(3, 300, 20), row(4, 560, 20)]
    said = {each.uid: alone(tiny, each) for each in rows}
    join(batches, tiny, rows[:4])
    join(batches, tiny, rows[4:])
    found: dict[int, list[int]] = {each.uid: [] for each in rows}
    seen = []
    while len(batches) or not found[4]:
        for each in batches.step():
            found[each.uid].append(each.token)
        seen.append(lengths(batches))
    assert found == said
    assert seen[0] == [[300] * 4, [600]]
    assert [300, 600] in seen[8]
    assert batches.nbytes == 0


def alone(tiny: LoadedModel, one: Row) -> list[int]:
    batches = made(tiny, 0)
    join(batches, tiny, [one])
    said: list[int] = []
    while len(said) < one.max_new_tokens:
        said += [each.token for each in batches.step()]
    return said


def test_a_cache_is_cut_when_its_longest_row_has_left(tiny: LoadedModel) -> None:
    """So a batch is never wider than what is counted for its longest row."""
    batches, footprint = made(tiny, 2**30), Footprint.of(tiny.model)
    join(batches, tiny, [row(1, 500, 3), *(row(uid, 100 + uid, 200) for uid in range(2, 6))])
    seen = []
    while len(batches) and (outputs := batches.step()) is not None:
        (lengths,) = batches.lengths or [[1]]
        seen.append(batches.nbytes / len(lengths) / footprint.allocated(max(lengths)))
        assert outputs or len(seen) == 1
    assert len(seen) > 200
    assert max(seen[1:4]) == max(seen) == 1.0
