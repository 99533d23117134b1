"""The prefix cache: lookup, sharing, isolation of owners, and eviction, on models of a few kilobytes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, llama

from tests.support import architectures
from tests.support.prefix_caches import PLENTY, counting, filled, store
from tests.support.small_models import small_model
from worker.runner import forward, kv_cache
from worker.runner.kv_cache import KVCache
from worker.runner.kv_segments import Layout
from worker.runner.prefix.blocks import BLOCK, BlockChain
from worker.runner.prefix.cache import MIN_TOKENS, PrefixCache, owner_with_adapter
from worker.runner.prefix.files import SUFFIX, PrefixFiles
from worker.runner.prefix.spill import Spill

TOKEN_BYTES = 2 * 2 * 2 * 4 * 4
"""Keys and values, layers, heads, head size, bytes."""


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama")


@pytest.fixture(scope="module")
def sliding() -> Any:
    """A model with a window of 8 tokens in every other layer."""
    return small_model(gemma3_text, model_type="gemma3_text", head_dim=4, sliding_window=8, sliding_window_pattern=2)


@pytest.fixture(scope="module")
def hybrid() -> Any:
    """A model with a recurrent state in every other layer."""
    return architectures.make("qwen3_5", vocab_size=64)


def nodes(cache: PrefixCache) -> Iterator[Any]:
    stack = list(cache._trees._roots.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


def check_invariants(cache: PrefixCache, max_bytes: int = PLENTY) -> None:
    """Check that the totals are right and within the limit, and that every node has a segment."""
    parts = [part for node in nodes(cache) for part in (node.segment, node.checkpoint) if part is not None]
    assert cache.nbytes == sum(part.nbytes for part in parts) <= max_bytes
    assert cache.stats()["prefix_cache_entries"] == len(parts)
    assert all(node.segment is not None for node in nodes(cache) if node.parent is not None)


def test_a_loaded_prefix_equals_the_cache_that_the_model_computes(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    first = counting(1, 40)
    cache.store("me", first, filled(model, counting(3, 60), first), 1)
    second = [*first[:29], *counting(50, 20)]
    assert cache.length("me", second) == 29
    length, loaded = cache.load("me", second)
    expected = filled(model, second[:29])
    assert length == 29
    for part, expected_part in zip(loaded.attention, expected.attention, strict=True):
        assert part.offset.tolist() == [29]
        assert mx.allclose(part.keys, expected_part.keys[:, :, :29], atol=1e-5)
        assert mx.allclose(part.values, expected_part.values[:, :, :29], atol=1e-5)
    assert cache.stats() | {"prefix_cache_bytes": 0} == {
        "prefix_cache_bytes": 0,
        "prefix_cache_entries": 1,
        "prefix_cache_lookups_total": 1,
        "prefix_cache_hits_total": 1,
        "prefix_cache_tokens_total": 29,
    }


def test_a_common_prefix_is_stored_once(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    system = counting(1, 100)
    for i in range(10):
        store(cache, model, [*system, *counting(2 * i, 20)])
    assert cache.nbytes == TOKEN_BYTES * (100 + 10 * 20)
    store(cache, model, system[:50])
    store(cache, model, [*system, *counting(0, 20)])
    assert cache.nbytes == TOKEN_BYTES * (100 + 10 * 20)
    check_invariants(cache)


def test_a_conversation_adds_only_the_tokens_of_each_turn(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    conversation: list[int] = []
    for turn in range(5):
        before = len(conversation)
        conversation += counting(turn, 20)
        assert cache.length("me", conversation) == before
        store(cache, model, conversation)
        assert cache.nbytes == TOKEN_BYTES * len(conversation)


def test_owners_share_nothing(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    tokens = counting(1, 50)
    store(cache, model, tokens, "me")
    assert cache.length("you", tokens) == 0
    assert cache.load("you", tokens)[0] == 0
    assert cache.length(None, tokens) == 0
    store(cache, model, tokens, "you")
    assert cache.nbytes == 2 * TOKEN_BYTES * 50
    cache.store(None, tokens, filled(model, tokens), 0)
    assert cache.nbytes == 2 * TOKEN_BYTES * 50


def test_short_prefixes_are_not_stored(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    store(cache, model, counting(1, MIN_TOKENS - 1))
    assert cache.nbytes == 0
    store(cache, model, counting(1, MIN_TOKENS))
    assert cache.length("me", counting(1, MIN_TOKENS)) == MIN_TOKENS
    assert cache.length("me", counting(1, MIN_TOKENS - 1)) == 0


def test_the_least_recently_used_prefix_is_evicted_first_from_its_end(model: Any) -> None:
    limit = TOKEN_BYTES * 100
    cache = PrefixCache(model, limit)
    system, tails = counting(1, 40), [counting(i, 20) for i in (0, 2, 4)]
    for tail in tails:
        store(cache, model, [*system, *tail])
    cache.load("me", [*system, *tails[0]])
    store(cache, model, [*system, *counting(6, 20)])
    assert [cache.length("me", [*system, *tail]) for tail in tails] == [60, 40, 60]
    check_invariants(cache, limit)
    cache.set_limit(TOKEN_BYTES * 45)
    assert cache.length("me", [*system, *tails[0]]) == 40
    cache.set_limit(PLENTY)
    store(cache, model, counting(9, 120))  # exceeds the limit on its own: nothing else is evicted
    assert cache.length("me", [*system, *tails[0]]) == 40
    check_invariants(cache, limit)


def test_nothing_is_stored_with_a_limit_of_zero(model: Any) -> None:
    off, full = PrefixCache(model, 0), PrefixCache(model, PLENTY)
    full.set_limit(0)
    for cache in (off, full):
        store(cache, model, counting(1, 50))
        assert cache.load("me", counting(1, 50))[0] == 0
        assert cache.nbytes == 0


def test_clear_drops_everything(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    store(cache, model, counting(1, 50))
    cache.clear()
    assert cache.length("me", counting(1, 50)) == 0
    assert cache.nbytes == 0
    check_invariants(cache)


@pytest.mark.parametrize("max_tokens", [60, 300, 100_000])
def test_random_prompts_keep_the_tree_consistent_and_find_the_longest_prefix(model: Any, max_tokens: int) -> None:
    draw = random.Random(max_tokens)
    limit = max_tokens * TOKEN_BYTES
    cache, stored = PrefixCache(model, limit), []
    for _ in range(150):
        begin = draw.choice(stored)[: draw.randrange(80)] if stored and draw.random() < 0.8 else []
        tokens = [*begin, *(draw.randrange(3) for _ in range(draw.randrange(1, 40)))]
        longest = max((common(tokens, other) for other in stored), default=0)
        length, loaded = cache.load("me", tokens)
        assert length == loaded.columns
        assert length <= longest
        if max_tokens == 100_000:
            assert length == (longest if longest >= MIN_TOKENS else 0)
        store(cache, model, tokens)
        if len(tokens) >= MIN_TOKENS:
            stored.append(tokens)
        check_invariants(cache, limit)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_a_sliding_window_can_be_cut_at_any_token(sliding: Any) -> None:
    cache = PrefixCache(sliding, PLENTY)
    tokens = counting(1, 400)
    store(cache, sliding, tokens)
    for length in (MIN_TOKENS, 30, 333, 400):
        assert cache.length("me", [*tokens[:length], 63, 63]) == length
        assert_same_logits(sliding, cache.load("me", [*tokens[:length], 63, 63])[1], tokens[:length])
    check_invariants(cache)


def test_after_columns_were_dropped_only_the_last_window_is_usable(sliding: Any) -> None:
    tokens, cache, prefixes = counting(1, 900), filled(sliding, []), PrefixCache(sliding, PLENTY)
    for token in tokens:
        forward.fill(sliding, cache, [[token]])
    prefixes.store("me", tokens, cache, 0)
    kept = min(part.copy(0, 900)[0].shape[2] for part in cache.attention)
    assert 8 < kept < 900
    lengths = [prefixes.length("me", [*tokens[:length], 63]) for length in (900, 900 - kept + 8, 900 - kept + 7, 500)]
    assert lengths == [900, 900 - kept + 8, 0, 0]
    store(prefixes, sliding, tokens[:500])  # the same tokens with all columns, as their prompt stores them
    assert_same_logits(sliding, prefixes.load("me", tokens)[1], tokens)


def test_a_prefix_that_does_not_fit_with_all_windows_is_thinned(sliding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.runner.kv_segments.CUTTABLE_TOKENS", 256)
    layout, tokens = Layout.of(sliding), [(i * i + i // 64) % 64 for i in range(1120)]
    assert layout is not None
    limit = layout.nbytes(880)
    assert limit > layout.thinned_nbytes(1120)
    cache, one = PrefixCache(sliding, limit), KVCache.empty(sliding)
    extend(cache, sliding, tokens[:928], one, 0)
    lengths = {length: cache.length("me", [*tokens[:length], 63]) for length in (928, 704, 400, 100)}
    assert lengths == {928: 928, 704: 704, 400: 256, 100: 0}  # the window before 256 is kept
    other = [*tokens[:704], *counting(5, 32)]
    extend(cache, sliding, other, cache.load("me", other)[1], 704)
    extend(cache, sliding, tokens, one, 928)
    for length in (256, 704, 1120):  # the window before the branch is kept, too
        known, loaded = cache.load("me", [*tokens[:length], 63])
        assert known == length
        assert_same_logits(sliding, loaded, tokens[:length])
    check_invariants(cache, limit)


def extend(cache: PrefixCache, model: Any, tokens: Sequence[int], row: KVCache, start: int) -> None:
    """Process the tokens from `start` on, and store each piece."""
    for stop in range(start + 32, len(tokens) + 1, 32):
        forward.fill(model, row, [tokens[stop - 32 : stop]])
        cache.store_partial("me", tokens[:stop], row, len(tokens))


def assert_same_logits(model: Any, cache: KVCache, tokens: Sequence[int]) -> None:
    """Compare the logits of the next tokens after a loaded prefix with those after the whole prompt."""
    loaded, whole = (forward.fill(model, each, [[9, 8, 7]]) for each in (cache, filled(model, tokens)))
    assert loaded is not None and whole is not None
    assert mx.allclose(loaded, whole, atol=1e-4)


def test_rows_of_recurrent_models_begin_at_checkpoints(hybrid: Any) -> None:
    cache = PrefixCache(hybrid, PLENTY)
    tokens = counting(1, 60)
    batch = filled(hybrid, tokens[:40])
    cache.store("me", tokens[:40], batch, 0)
    forward.fill(hybrid, batch, [tokens[40:50]])
    cache.store("me", tokens[:50], batch, 0, checkpoint=False)
    forward.fill(hybrid, batch, [tokens[50:]])
    cache.store("me", tokens, batch, 0)
    assert [cache.length("me", [*tokens[:length], 63]) for length in (39, 40, 50, 59, 60)] == [0, 40, 40, 40, 60]
    assert cache.matched("me", [*tokens[:50], 63]) == 50
    for length in (40, 60):
        assert_same_logits(hybrid, cache.load("me", [*tokens[:length], 63])[1], tokens[:length])
    check_invariants(cache)


def test_a_checkpoint_splits_the_tokens_that_are_already_stored(hybrid: Any) -> None:
    cache = PrefixCache(hybrid, PLENTY)
    tokens = counting(1, 60)
    store(cache, hybrid, tokens)
    store(cache, hybrid, tokens[:30])
    assert [cache.length("me", [*tokens[:length], 63]) for length in (30, 60)] == [30, 60]
    assert_same_logits(hybrid, cache.load("me", [*tokens, 63])[1], tokens)
    check_invariants(cache)


def test_the_least_recently_used_checkpoint_is_evicted_first(hybrid: Any) -> None:
    cache = PrefixCache(hybrid, PLENTY)
    tokens = counting(1, 60)
    for length in (20, 40, 60):
        store(cache, hybrid, tokens[:length])
    cache.load("me", [*tokens[:20], 63])
    cache.set_limit(cache.nbytes - 1)
    assert [cache.length("me", tokens[:length]) for length in (20, 40, 60)] == [20, 20, 60]
    check_invariants(cache)
    while cache.nbytes:
        cache.set_limit(cache.nbytes - 1)
        check_invariants(cache)


def test_an_error_while_storing_only_disables_the_prefix_cache(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PrefixCache(model, PLENTY)
    store(cache, model, counting(1, 50))
    monkeypatch.setattr("worker.runner.kv_segments.Segment.copy_from", lambda *_: 1 / 0)
    store(cache, model, counting(2, 50))
    store(cache, model, counting(3, 50))
    assert cache.load("me", counting(1, 50))[0] == 0
    assert len(caplog.records) == 1
    check_invariants(cache)


def test_a_failed_allocation_while_storing_drops_all_prefixes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(model, PLENTY)
    store(cache, model, counting(1, 50))

    def full(*_: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr("worker.runner.kv_segments.Segment.copy_from", full)
        store(cache, model, counting(2, 50))
    assert cache.nbytes == 0
    store(cache, model, counting(1, 50))
    assert cache.length("me", counting(1, 50)) == 50


def test_a_shared_prefix_is_usable_by_all_owners(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    tokens = counting(1, 50)
    store(cache, model, tokens)
    cache.share("me", tokens[:30])
    assert cache.length("you", tokens) == 30
    assert cache.length("me", tokens) == 50
    assert cache.length(None, tokens) == 0
    length, loaded = cache.load("you", tokens)
    assert length == 30
    assert mx.allclose(loaded.layers[0].keys, filled(model, tokens).layers[0].keys[:, :, :30], atol=1e-5)
    store(cache, model, [*tokens[:30], *counting(9, 20)], "you")
    assert cache.length("me", [*tokens[:30], *counting(9, 20)]) == 30  # only the shared part
    assert cache.nbytes == TOKEN_BYTES * (50 + 30 + 50)
    cache.share("me", tokens[:30])
    cache.share("me", [*tokens[:40], 1])  # not cached for this owner
    assert cache.nbytes == TOKEN_BYTES * (50 + 30 + 50)
    check_invariants(cache)


def test_prefixes_are_kept_apart_by_adapter_also_shared_ones(model: Any) -> None:
    cache, tokens = PrefixCache(model, PLENTY), counting(1, 50)
    mine, yours = (owner_with_adapter(owner, "sql") for owner in ("me", "you"))
    store(cache, model, tokens, mine)
    cache.share(mine, tokens[:30])
    assert [cache.length(owner, tokens) for owner in (mine, yours)] == [50, 30]
    others = ("me", "you", owner_with_adapter("me", "mail"), owner_with_adapter("you", "mail"))
    assert [cache.length(owner, tokens) for owner in others] == [0, 0, 0, 0]
    check_invariants(cache)


def test_a_prefix_with_windows_is_shared_up_to_any_token(sliding: Any) -> None:
    cache = PrefixCache(sliding, PLENTY)
    tokens = counting(1, 60)
    store(cache, sliding, tokens)
    cache.share("me", tokens[:33])
    assert cache.length("you", tokens) == 33
    assert_same_logits(sliding, cache.load("you", tokens)[1], tokens[:33])
    check_invariants(cache)


def test_a_recurrent_prefix_is_shared_up_to_a_checkpoint(hybrid: Any) -> None:
    cache = PrefixCache(hybrid, PLENTY)
    tokens = counting(1, 40)
    store(cache, hybrid, tokens)
    cache.share("me", tokens[:30])
    assert cache.length("you", tokens) == 0
    store(cache, hybrid, tokens[:30])
    cache.share("me", tokens[:30])
    assert cache.length("you", tokens) == 30
    assert_same_logits(hybrid, cache.load("you", tokens)[1], tokens[:30])
    check_invariants(cache)


@pytest.mark.parametrize("length", [2_000, 20_000])
def test_the_cost_of_evicting_the_end_of_a_prefix_does_not_depend_on_its_length(
    model: Any, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the evicted tokens are hashed, also for a prompt that is ten times as long."""
    spill = Spill(PrefixFiles(tmp_path, "model", PLENTY, 1e6), PLENTY // 8)
    cache = PrefixCache(model, PLENTY, spill)
    tokens, width = counting(1, length), 200
    columns = [[mx.zeros((1, 2, length, 4)), mx.zeros((1, 2, length, 4))] for _ in range(2)]
    for end in range(width, length + 1, width):  # as the prefill stores a long prompt
        row = kv_cache.row_of(model, [[array[:, :, :end] for array in arrays] for arrays in columns], [], end)
        cache.store("me", tokens[:end], row, 0)
    hashed: list[int] = []
    blocks = BlockChain.blocks
    monkeypatch.setattr(BlockChain, "blocks", lambda chain, some: (hashed.append(len(some)), blocks(chain, some))[1])
    cache.set_limit(cache.nbytes - 1 + spill.pending_bytes)
    assert cache.length("me", tokens) == length - width
    assert hashed == [width]
    spill.close(10)
    written = sorted(tmp_path.rglob("*" + SUFFIX))
    assert len(written) == length // BLOCK - (length - width) // BLOCK
