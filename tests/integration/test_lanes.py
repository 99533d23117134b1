"""Rows of different lengths beside each other: which share a batch, and what that spares the short ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.request import Sampling
from worker.models.load import LoadedModel, load_model
from worker.runner import kv_cache as kv
from worker.runner.base import Row
from worker.runner.length_buckets import Lanes
from worker.runner.memory import Footprint
from worker.runner.prefix_cache import PrefixCache
from worker.runner.speculation.verification import Speculation

PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Bytes of the tiny model's cache: keys and values, layers, heads, width, bytes of a number."""
MOST_PADDING = 550 * PER_TOKEN


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def lanes(tiny: LoadedModel) -> Lanes:
    return Lanes(
        tiny.model, PrefixCache(tiny.model, 0), Footprint.of(tiny.model), MOST_PADDING, Speculation(tiny.model, 0)
    )


def row(uid: int, length: int, room: int) -> Row:
    return Row(uid, tuple((uid * 977 + i * 131) % 40_000 + 100 for i in range(length)), 0, room, Sampling(0.0))


def join(lanes: Lanes, tiny: LoadedModel, rows: Sequence[Row]) -> None:
    cache = kv.empty(tiny.model, len(rows))
    kv.feed(tiny.model, cache, [each.prompt[:-1] for each in rows])
    lanes.join(rows, cache)


def lengths(lanes: Lanes) -> list[list[int]]:
    """By lane, shortest first, to the hundred."""
    return sorted(sorted(round(length, -2) for length in lane) for lane in lanes.lengths)


def test_a_long_row_neither_widens_nor_copies_the_short_ones(tiny: LoadedModel, lanes: Lanes) -> None:
    join(lanes, tiny, [row(uid, 100, 50) for uid in range(4)])
    assert [uid for _ in range(2) for uid, _ in lanes.step()] == [0, 1, 2, 3]
    short = lanes.nbytes()
    join(lanes, tiny, [row(9, 1200, 50)])
    lanes.step()
    assert lengths(lanes) == [[100] * 4, [1200]]
    assert {uid for uid, _ in lanes.step()} == {0, 1, 2, 3, 9}
    assert lanes.nbytes() - short <= 1536 * PER_TOKEN


def test_rows_share_a_lane_as_long_as_its_padding_is_worth_less_than_a_pass(tiny: LoadedModel, lanes: Lanes) -> None:
    for uid, length in enumerate((100, 300, 400, 1000, 200, 1100)):
        join(lanes, tiny, [row(uid, length, 9)])
    assert lengths(lanes) == [[100, 300, 400], [200], [1000, 1100]]


def test_lanes_unite_when_rows_have_left(tiny: LoadedModel, lanes: Lanes) -> None:
    """A long row and the last of the short ones go on in one lane, and say what they would have said alone."""
    rows = [*(row(uid, 300, 4) for uid in range(3)), row(3, 300, 20), row(4, 560, 20)]
    said = {each.uid: alone(tiny, each) for each in rows}
    join(lanes, tiny, rows[:4])
    join(lanes, tiny, rows[4:])
    found: dict[int, list[int]] = {each.uid: [] for each in rows}
    seen = []
    while len(lanes) or not found[4]:
        for uid, token in lanes.step():
            found[uid].append(token)
        seen.append(lengths(lanes))
    assert found == said
    assert seen[0] == [[300] * 4, [600]]
    assert [300, 600] in seen[8]
    assert lanes.nbytes() == 0


def alone(tiny: LoadedModel, one: Row) -> list[int]:
    lanes = Lanes(tiny.model, PrefixCache(tiny.model, 0), Footprint.of(tiny.model), 0, Speculation(tiny.model, 0))
    join(lanes, tiny, [one])
    said = []
    while len(said) < one.room:
        said += [token for _, token in lanes.step()]
    return said
