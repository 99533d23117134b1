"""Prefill: the execution of plans, the predicted cost, and the prefixes stored on the way."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, llama

from shared.jobs.request import Request, Sampling
from tests.support.small_models import small_model
from worker.runner import forward, prefill_cost
from worker.runner.base import PrefillWork, RemainingPrompt, Row
from worker.runner.cost import UNKNOWN_COST, PrefillCost
from worker.runner.kv_cache import Columns, KVCache
from worker.runner.prefill import MAX_REFRESHED, STORED_TOKENS, Prefill, Prefilled
from worker.runner.prefix.cache import PrefixCache

CHUNK = 16
PLENTY = 2**30


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama")


@pytest.fixture(scope="module")
def deep() -> Any:
    """A model of nine layers. A chunk runs through eight of them."""
    return small_model(llama, model_type="llama", num_hidden_layers=9)


@pytest.fixture
def prefixes(model: Any) -> PrefixCache:
    return PrefixCache(model, PLENTY)


@pytest.fixture
def prefill(model: Any, prefixes: PrefixCache) -> Prefill:
    return Prefill(model, CHUNK, prefixes, UNKNOWN_COST)


def row(uid: int, tokens: int, prompt_ids: tuple[int, ...] | None = None) -> Row:
    """Return a row with this many tokens to prefill."""
    return Row(uid, Request("m", 5, Sampling(0.0)), prompt_ids or prompt(uid, tokens + 1), 0, 5, "me")


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return (seed % 64, *((seed * 7 + i * (1 + seed % 5)) % 64 for i in range(1, length)))


def chunk(uid: int, tokens: int = CHUNK, layers: int | None = None) -> PrefillWork:
    return PrefillWork((uid,), tokens, layers)


def chunks(
    prefill: Prefill, uid: int, tokens: int = CHUNK, layers: int | None = None, *, decoding: bool = True
) -> Iterator[Prefilled]:
    """Process a row chunk by chunk; yields the result of each step."""
    for _ in range(1000):
        yield (done := prefill.advance(chunk(uid, tokens, layers), decoding=decoding))
        if uid in [each.uid for each in done.rows]:
            return
    pytest.fail("the prefill does not end")


def assert_close(columns: Columns, expected: Columns) -> None:
    for layer, expected_layer in zip(columns, expected, strict=True):
        assert all(mx.allclose(one, other, atol=1e-5) for one, other in zip(layer, expected_layer, strict=True))


def test_rows_are_prefilled_together_in_one_step(model: Any, prefill: Prefill) -> None:
    rows = [row(uid, 3 + 5 * uid) for uid in range(1, 5)]
    for each in rows:
        prefill.add(each)
    assert list(prefill.remaining().values()) == [
        RemainingPrompt(8, 0),
        RemainingPrompt(13, 0),
        RemainingPrompt(18, 0),
        RemainingPrompt(23, 0),
    ]
    done = prefill.advance(PrefillWork((3, 1, 4)), decoding=True)
    assert [each.uid for each in done.rows] == [3, 1, 4]
    assert (done.tokens, done.reused, done.predicted_s) == (18 + 8 + 23, (0, 0, 0), None)
    for index, each in enumerate(done.rows):
        expected = KVCache.empty(model)
        forward.fill(model, expected, [each.prompt[:-1]])
        length = len(each.prompt) - 1
        assert_close(done.cache.copy_columns(index, length), expected.copy_columns(0, length))
    assert list(prefill.remaining()) == [2]


def test_a_partially_prefilled_row_is_processed_alone(prefill: Prefill) -> None:
    for each in (row(1, 40), row(2, 8)):
        prefill.add(each)
    prefill.advance(chunk(1), decoding=True)
    assert prefill.remaining()[1] == RemainingPrompt(24, 16)
    done = prefill.advance(PrefillWork((1, 2)), decoding=False)
    assert ([each.uid for each in done.rows], done.tokens) == ([1], 24)
    assert prefill.remaining() == {2: RemainingPrompt(8, 0)}


def test_an_empty_plan_or_unknown_rows_are_no_work(prefill: Prefill) -> None:
    prefill.add(row(1, 8))
    for work in (None, PrefillWork((7,))):
        done = prefill.advance(work, decoding=True)
        assert (done.rows, done.tokens, done.predicted_s) == ((), 0, 0.0)
    assert prefill.remaining() == {1: RemainingPrompt(8, 0)}


def test_waiting_rows_learn_of_new_prefixes(prefill: Prefill) -> None:
    """A few rows per step look up their prefix again."""
    rows = [row(uid, 0, (*prompt(1, 40), uid)) for uid in range(2, 2 + 2 * MAX_REFRESHED)]
    for each in (row(1, 40), *rows):
        prefill.add(each)
    prefill.advance(PrefillWork((1,)), decoding=False)
    known = [sum(each.position == 40 for each in prefill.remaining().values()) for _ in range(2)]
    assert known == [MAX_REFRESHED, 2 * MAX_REFRESHED]
    done = prefill.advance(PrefillWork(tuple(each.uid for each in rows)), decoding=False)
    assert done.tokens == 0
    assert set(done.reused) == {40}


def test_a_row_with_an_evicted_prefix_waits_for_the_next_plan(prefill: Prefill, prefixes: PrefixCache) -> None:
    prefill.add(row(1, 40))
    prefill.advance(PrefillWork((1,)), decoding=False)
    prefill.add(row(2, 0, (*prompt(1, 40), 9, 9)))
    prefill.add(row(3, 5))
    assert prefill.remaining()[2] == RemainingPrompt(1, 40)
    prefixes.clear()
    assert [each.uid for each in prefill.advance(PrefillWork((2, 3)), decoding=False).rows] == [3]
    assert prefill.remaining() == {2: RemainingPrompt(41, 0)}


def test_a_cache_is_allocated_and_copied_in_separate_steps_while_rows_decode(prefill: Prefill) -> None:
    prefill.add(row(1, 600))
    done = list(chunks(prefill, 1))
    assert [each.tokens > 0 for each in done[:4]] == [True, False, False, True]
    longer = (*prompt(1, 601)[:600], 1, *prompt(9, 300))
    prefill.add(row(2, 0, longer))
    done = list(chunks(prefill, 2))
    assert [each.tokens > 0 for each in done[:4]] == [False, False, False, True]
    assert {each.predicted_s for each in done[:3]} == {None}
    assert done[-1].reused == (600,)
    prefill.add(row(3, 0, (*longer, 1, *prompt(11, 300))))
    assert all(each.tokens for each in chunks(prefill, 3, decoding=False))


def test_a_long_prompt_is_stored_during_its_prefill(prefill: Prefill, prefixes: PrefixCache) -> None:
    long = row(1, 4 * STORED_TOKENS + 7)
    prefill.add(long)
    known = []
    for done in chunks(prefill, 1):
        cache = done.cache
        known.append(prefixes.length("me", long.prompt))
    assert max(after - before for before, after in pairwise(known)) < STORED_TOKENS + CHUNK
    assert known[-1] == 4 * STORED_TOKENS + 7
    assert prefixes.nbytes == known[-1] * 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, head size, bytes
    length, loaded = prefixes.load("me", long.prompt)
    for arrays, expected in zip(loaded.copy_columns(0, length), cache.copy_columns(0, length), strict=True):
        assert all(map(mx.array_equal, arrays, expected))


def test_a_prompt_that_exceeds_the_prefix_limit_evicts_nothing(model: Any) -> None:
    prefixes = PrefixCache(model, 300 * 2 * 2 * 2 * 4 * 4)
    prefill = Prefill(model, CHUNK, prefixes, UNKNOWN_COST)
    for uid, length in ((1, 100), (2, 3 * STORED_TOKENS)):
        prefill.add(row(uid, length))
        list(chunks(prefill, uid))
    assert prefixes.length("me", prompt(1, 101)) == 100
    assert prefixes.length("me", prompt(2, 101)) == 0


def test_a_prompt_with_sliding_windows_is_stored_during_its_prefill(model: Any) -> None:
    sliding = small_model(gemma3_text, model_type="gemma3_text", head_dim=4, sliding_window=8, sliding_window_pattern=2)
    prefixes = PrefixCache(sliding, PLENTY)
    prefill = Prefill(sliding, CHUNK, prefixes, UNKNOWN_COST)
    prefill.add(row(1, 2 * STORED_TOKENS + 9))
    list(chunks(prefill, 1))
    assert prefixes.length("me", prompt(1, STORED_TOKENS + 7)) == STORED_TOKENS + 7


def test_rows_can_be_removed_at_every_stage(prefill: Prefill, prefixes: PrefixCache) -> None:
    for each in (row(1, 40 * CHUNK), row(2, 40 * CHUNK), row(3, 4)):
        prefill.add(each)
    for _ in range(4):
        prefill.advance(chunk(1), decoding=False)
    assert prefill.nbytes > 0
    prefill.remove([1, 2, 9])
    assert prefill.nbytes == 0
    assert prefixes.length("me", row(1, 40 * CHUNK).prompt) == 4 * CHUNK
    assert list(prefill.remaining()) == [3]


def test_several_long_prompts_can_be_prefilled_alternately(prefill: Prefill) -> None:
    for each in (row(1, 5 * CHUNK), row(2, 3 * CHUNK)):
        prefill.add(each)
    order = [1, 2, 1, 2, 2, 1]
    ended = [[each.uid for each in prefill.advance(chunk(uid), decoding=False).rows] for uid in order]
    assert ended == [[], [], [], [], [2], []]
    assert prefill.remaining() == {1: RemainingPrompt(2 * CHUNK, 3 * CHUNK)}


@pytest.fixture
def slow(deep: Any) -> Prefill:
    """A prefill with a predicted cost of one second per chunk, regardless of its size."""
    return Prefill(deep, CHUNK, PrefixCache(deep, PLENTY), PrefillCost(1.0, 1e-9, 0.0))


def test_a_chunk_that_runs_a_few_layers_per_step_fills_the_same_cache(deep: Any, slow: Prefill) -> None:
    long = row(1, 10 * CHUNK + 5)
    whole = Prefill(deep, CHUNK, PrefixCache(deep, 0), UNKNOWN_COST)
    caches = []
    for prefill, layers in ((slow, 3), (whole, None)):
        prefill.add(long)
        done = list(chunks(prefill, 1, layers=layers))
        assert [each.tokens for each in done if each.tokens] == [CHUNK] * 10 + [5]
        caches.append(done[-1].cache)
    assert_close(*(cache.copy_columns(0, 10 * CHUNK + 5) for cache in caches))


def test_a_step_predicts_the_cost_of_its_layers(slow: Prefill) -> None:
    slow.add(row(1, 10 * CHUNK))
    done = list(chunks(slow, 1, layers=3))
    parts = [each.predicted_s for each in done if each.predicted_s]
    assert {round(8 * part) for part in parts} == {2, 3}
    assert sum(parts) == pytest.approx(10, abs=3 / 8), (
        "the last step, in which the row joins a batch, has no prediction"
    )


def test_the_remaining_prompt_includes_the_unfinished_chunk(slow: Prefill) -> None:
    slow.add(row(1, 40))
    slow.advance(chunk(1, CHUNK, 3), decoding=True)
    assert slow.remaining() == {1: RemainingPrompt(40, 0, CHUNK)}
    slow.advance(chunk(1, 99, 4), decoding=True)
    assert slow.remaining() == {1: RemainingPrompt(40, 0, CHUNK)}
    assert slow.advance(chunk(1, 99), decoding=True).tokens == CHUNK
    assert slow.remaining() == {1: RemainingPrompt(24, CHUNK)}


def test_only_the_caches_of_processed_layers_are_filled(slow: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    queue = KVCache.queue
    monkeypatch.setattr(KVCache, "queue", lambda cache: (filled.append(len(cache.layers)), queue(cache))[1])
    slow.add(row(1, 3 * CHUNK))
    while sum(filled) < 9:
        slow.advance(chunk(1, CHUNK, 3), decoding=True)
    assert filled == [4, 3, 2]


def test_a_row_that_is_removed_within_a_chunk_keeps_its_stored_prefix(deep: Any) -> None:
    prefixes = PrefixCache(deep, PLENTY)
    slow = Prefill(deep, CHUNK, prefixes, UNKNOWN_COST)
    long = row(1, 2 * STORED_TOKENS)
    slow.add(long)
    for _ in chunks(slow, 1, layers=3):
        stored = prefixes.length("me", long.prompt)
        if stored and slow.remaining()[1].position > stored and slow.remaining()[1].in_progress:
            break
    slow.remove([1])
    assert (slow.remaining(), slow.nbytes) == ({}, 0)
    length, loaded = prefixes.load("me", long.prompt)
    assert length == STORED_TOKENS
    whole = KVCache.empty(deep)
    forward.fill(deep, whole, [long.prompt[:length]])
    assert_close(loaded.copy_columns(0, length), whole.copy_columns(0, length))


@pytest.mark.parametrize("work", [PrefillWork((1, 2)), PrefillWork((1,), CHUNK)], ids=["together", "chunk"])
def test_a_failed_allocation_drops_the_current_rows_and_all_prefixes(
    prefill: Prefill, prefixes: PrefixCache, work: PrefillWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill.add(row(5, 40))
    prefill.advance(PrefillWork((5,)), decoding=False)
    for uid in (1, 2, 3):
        prefill.add(row(uid, 3 * CHUNK))

    def full(*_: object, **_options: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 4294967296 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(forward, "fill", full)
        done = prefill.advance(work, decoding=False)
    assert done.out_of_memory == work.uids
    assert prefixes.nbytes == prefill.nbytes == 0
    assert list(prefill.remaining()) == [uid for uid in (1, 2, 3) if uid not in work.uids]
    monkeypatch.setattr(forward, "fill", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefill.advance(PrefillWork((3,)), decoding=False)


def test_the_cost_of_a_chunk_is_measured_on_the_model(model: Any) -> None:
    def measure() -> Generator[None, None, None]:
        nonlocal cost
        cost = yield from prefill_cost.measure(model, CHUNK)

    cost = UNKNOWN_COST
    assert sum(1 for _ in measure()) > 3, "the measurement must yield between passes"
    assert cost is not UNKNOWN_COST
    assert cost.token > 0
    assert cost.fixed >= 0
    assert cost.attention >= 0
