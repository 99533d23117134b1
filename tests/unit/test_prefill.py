"""In which order prompts are read, how much of them in a step, and what is kept of them along the way."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, llama

from shared.jobs.request import Sampling
from tests.support.small_models import small_model
from worker.engine.prefill_budget import AIM, Pace
from worker.runner import kv_cache as kv
from worker.runner import prefill_cost as cost
from worker.runner.base import Row
from worker.runner.prefill import KEPT_AT_ONCE, MOST_TOGETHER, SHORT_CHUNKS, Chunk, Prefill
from worker.runner.prefill_cost import Cost
from worker.runner.prefix_cache import PrefixCache

CHUNK = 16
PLENTY = 2**30


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama")


@pytest.fixture
def prefixes(model: Any) -> PrefixCache:
    return PrefixCache(model, PLENTY)


@pytest.fixture
def prefill(model: Any, prefixes: PrefixCache) -> Prefill:
    return Prefill(model, CHUNK, prefixes, allowing(20))


def allowing(tokens: int) -> Pace:
    """A pace that has time for so many tokens in a step."""
    pace = Pace(CHUNK)
    pace.expect(Cost(0.0, 1.0, 0.0))
    for _ in range(3):
        pace.stepped(tokens / (AIM - 1), 0.0)
    while pace.rests():
        pass
    return pace


def row(uid: int, unread: int, owner: str = "me") -> Row:
    return Row(uid, prompt(uid, unread + 1), 0, 5, Sampling(0.0), owner)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return (seed % 64, *((seed * 7 + i * (1 + seed % 5)) % 64 for i in range(1, length)))


def insert(prefill: Prefill, rows: Sequence[Row]) -> None:
    for each in rows:
        prefill.add(each)


def advance(prefill: Prefill, decoding: bool = True, most: int = 1000) -> list[Chunk]:
    """Read until nothing is left."""
    chunks = []
    while prefill:
        chunks.append(prefill.advance(decoding))
        assert len(chunks) < most
    return chunks


def uids(chunk: Chunk) -> list[int]:
    return [each.uid for each in chunk.rows]


def test_short_prompts_do_not_wait_behind_long_ones(prefill: Prefill) -> None:
    insert(prefill, [row(1, 40 * CHUNK), row(2, 40 * CHUNK), *(row(uid, CHUNK) for uid in range(3, 6))])
    chunks = advance(prefill)
    order = [uid for chunk in chunks for uid in uids(chunk)]
    assert order == [3, 4, 5, 1, 2]
    assert uids(chunks[0]) == [3, 4, 5]


def test_a_long_prompt_does_not_wait_for_short_ones_that_keep_coming(prefill: Prefill) -> None:
    prefill.add(row(0, 5 * CHUNK))
    read: list[int] = []
    for uid in range(1, 50):
        prefill.add(row(uid, CHUNK))
        read += uids(prefill.advance(True))
        if 0 in read:
            break
    assert len(read) < 14


@pytest.mark.parametrize("decoding", [False, True])
def test_short_prompts_that_come_at_once_are_read_together_whatever_decodes(prefill: Prefill, decoding: bool) -> None:
    insert(prefill, [row(uid, CHUNK) for uid in range(1, 2 * MOST_TOGETHER + 1)])
    assert [len(chunk.rows) for chunk in advance(prefill, decoding)] == [MOST_TOGETHER, MOST_TOGETHER]


def test_few_tokens_far_behind_the_beginning_may_be_a_long_prompt(model: Any, prefixes: PrefixCache) -> None:
    pace = Pace(CHUNK)
    pace.expect(Cost(0.0, 1.0, 0.1))
    prefill = Prefill(model, CHUNK, prefixes, pace)
    before = prompt(1, 200)
    layers = kv.empty(model, 1)
    kv.feed(model, layers, [before])
    prefixes.store("me", before, layers, 0)
    insert(prefill, [Row(2, (*before, 5, 6, 7, 8), 0, 5, Sampling(0.0), "me"), row(3, 5)])
    assert [uid for chunk in advance(prefill) for uid in uids(chunk)] == [3, 2]


def test_a_cache_is_made_and_copied_in_steps_of_their_own(prefill: Prefill) -> None:
    """Beside rows that decode, and only there."""
    prefill.add(row(1, 600))
    chunks = advance(prefill)
    assert [chunk.tokens > 0 for chunk in chunks[:4]] == [True, False, False, True]
    longer = (*prompt(1, 601)[:600], 1, *prompt(9, 300))
    prefill.add(Row(2, longer, 0, 5, Sampling(0.0), "me"))
    chunks = advance(prefill)
    assert [chunk.tokens > 0 for chunk in chunks[:4]] == [False, False, False, True]
    assert {chunk.foretold for chunk in chunks[:3]} == {None}
    assert chunks[-1].reused == (600,)
    prefill.add(Row(3, (*longer, 1, *prompt(11, 300)), 0, 5, Sampling(0.0), "me"))
    assert all(chunk.tokens for chunk in advance(prefill, decoding=False))


def test_a_long_prompt_is_kept_along_its_way(model: Any, prefill: Prefill, prefixes: PrefixCache) -> None:
    long = row(1, 4 * KEPT_AT_ONCE + 7)
    prefill.add(long)
    known = []
    while prefill:
        chunk = prefill.advance(True)
        known.append(prefixes.length("me", long.prompt))
    assert max(after - before for before, after in pairwise(known)) < KEPT_AT_ONCE + CHUNK
    assert known[-1] == 4 * KEPT_AT_ONCE + 7
    assert prefixes.nbytes == known[-1] * 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, width, bytes
    length, layers = prefixes.load("me", long.prompt)
    for kept, read in zip(layers, chunk.cache, strict=True):
        for ours, theirs in zip((kept.keys, kept.values), (read.keys, read.values), strict=True):
            assert mx.array_equal(ours, theirs[:, :, :length])


def test_a_prompt_that_is_too_long_to_be_kept_displaces_nothing(model: Any) -> None:
    prefixes = PrefixCache(model, 300 * 2 * 2 * 2 * 4 * 4)
    prefill = Prefill(model, CHUNK, prefixes, allowing(20))
    insert(prefill, [row(1, 100)])
    advance(prefill)
    insert(prefill, [row(2, 3 * KEPT_AT_ONCE)])
    advance(prefill)
    assert prefixes.length("me", prompt(1, 101)) == 100
    assert prefixes.length("me", prompt(2, 101)) == 0


def test_what_cannot_be_cut_is_kept_once(model: Any) -> None:
    sliding = small_model(gemma3_text, model_type="gemma3_text", head_dim=4, sliding_window=8, sliding_window_pattern=2)
    prefixes = PrefixCache(sliding, PLENTY)
    prefill = Prefill(sliding, CHUNK, prefixes, allowing(20))
    prefill.add(row(1, 2 * KEPT_AT_ONCE + 9))
    advance(prefill)
    assert prefixes.stats()["prefix_cache_entries"] == 1


def test_rows_are_dropped_in_either_line(prefill: Prefill, prefixes: PrefixCache) -> None:
    insert(prefill, [row(1, 40 * CHUNK), row(2, SHORT_CHUNKS * CHUNK), row(3, 4), row(4, 40 * CHUNK)])
    for _ in range(4):
        prefill.advance(True)
    assert prefill.nbytes() > 0
    insert(prefill, [row(5, SHORT_CHUNKS * CHUNK), row(6, 4)])
    prefill.remove([1, 4, 5])
    assert prefill.nbytes() == 0
    assert prefixes.length("me", row(1, 40 * CHUNK).prompt) >= CHUNK
    assert [uids(chunk) for chunk in advance(prefill)] == [[6]]


@pytest.fixture(scope="module")
def deep() -> Any:
    """A model of nine layers, of which a chunk runs eight."""
    return small_model(llama, model_type="llama", num_hidden_layers=9)


@pytest.fixture
def deep_prefixes(deep: Any) -> PrefixCache:
    return PrefixCache(deep, PLENTY)


@pytest.fixture
def slow(deep: Any, deep_prefixes: PrefixCache) -> Prefill:
    """In each step there is time for three of the eight; a chunk takes no less time with fewer tokens."""
    pace = allowing(1)
    pace.expect(Cost(1.0, 1e-9, 0.0))
    for _ in range(9):
        pace.stepped(3.1 / 8 / (AIM - 1), 0.0)
    return Prefill(deep, CHUNK, deep_prefixes, pace)


def test_a_chunk_runs_a_few_layers_a_step_and_fills_the_same_cache(deep: Any, slow: Prefill) -> None:
    long = row(1, 10 * CHUNK + 5)
    whole = Prefill(deep, CHUNK, PrefixCache(deep, 0), Pace(CHUNK))
    caches = []
    for prefill, decoding in ((slow, True), (whole, False)):
        prefill.add(long)
        chunks = advance(prefill, decoding)
        assert [chunk.tokens for chunk in chunks if chunk.tokens] == [CHUNK] * 10 + [5]
        caches.append(chunks[-1].cache)
    for ours, theirs in zip(*caches, strict=True):
        assert mx.allclose(ours.state[0], theirs.state[0], atol=1e-5)
        assert mx.allclose(ours.state[1], theirs.state[1], atol=1e-5)


def test_a_step_is_told_of_as_much_as_it_did(slow: Prefill) -> None:
    slow.add(row(1, 10 * CHUNK))
    chunks = advance(slow)
    parts = [chunk.foretold for chunk in chunks if chunk.foretold and not chunk.rows]
    assert {round(8 * part) for part in parts} == {2, 3}
    assert sum(parts) == pytest.approx(10, abs=3 / 8), "the last is not told: the row joins in that step"


def test_only_the_caches_of_layers_that_were_run_are_filled(slow: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    queue = kv.queue
    monkeypatch.setattr(kv, "queue", lambda layers: (filled.append(len(layers)), queue(layers))[1])
    slow.add(row(1, 3 * CHUNK))
    while slow and sum(filled) < 9:
        slow.advance(True)
    assert filled == [4, 3, 2]


def test_a_row_that_leaves_amid_a_chunk_leaves_what_was_kept_along_its_way(
    deep: Any, slow: Prefill, deep_prefixes: PrefixCache
) -> None:
    long = row(1, 2 * KEPT_AT_ONCE)
    slow.add(long)
    while slow and not deep_prefixes.length("me", long.prompt):
        slow.advance(True)
    while not slow.advance(True).tokens:
        pass  # a chunk more, which is not kept yet
    while not slow.advance(True).foretold:
        pass  # a pause
    slow.remove([1])
    assert (len(slow), slow.nbytes()) == (0, 0)
    length, layers = deep_prefixes.load("me", long.prompt)
    assert length == KEPT_AT_ONCE
    whole = kv.empty(deep, 1)
    kv.feed(deep, whole, [long.prompt[:length]])
    for ours, theirs in zip(layers, whole, strict=True):
        assert mx.allclose(ours.keys[:, :, :length], theirs.keys[:, :, :length], atol=1e-5)


def test_where_nobody_decodes_any_more_the_rest_of_a_chunk_is_one_step(slow: Prefill) -> None:
    slow.add(row(1, 10 * CHUNK))
    while slow and not slow.advance(True).tokens:
        pass
    assert 0 in (slow.advance(True).tokens, slow.advance(True).tokens)
    assert [chunk.tokens for chunk in advance(slow, decoding=False)] == [CHUNK] * 9


def test_what_a_chunk_costs_is_measured_on_the_model(model: Any) -> None:
    def measured() -> Generator[None, None, None]:
        nonlocal found
        found = yield from cost.measuring(model, CHUNK)

    found = cost.UNKNOWN
    assert sum(1 for _ in measured()) > 3, "in pieces"
    assert found is not cost.UNKNOWN
    assert found.token > 0
    assert found.fixed >= 0
    assert found.behind >= 0
