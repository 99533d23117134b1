"""What earlier rows leave behind: found, shared, kept apart and forgotten, on models of a few kilobytes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, llama

from tests.support.small_models import small_model
from worker.runner import forward, kv_cache
from worker.runner.kv_cache import KVCache
from worker.runner.prefix.blocks import BLOCK, BlockChain
from worker.runner.prefix.cache import MIN_TOKENS, PrefixCache
from worker.runner.prefix.files import SUFFIX, PrefixFiles
from worker.runner.prefix.spill import Spill

PLENTY = 2**30
TOKEN_BYTES = 2 * 2 * 2 * 4 * 4
"""Keys and values, layers, heads, width, bytes."""


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama")


@pytest.fixture(scope="module")
def sliding() -> Any:
    """Every other layer looks back 8 tokens only."""
    return small_model(gemma3_text, model_type="gemma3_text", head_dim=4, sliding_window=8, sliding_window_pattern=2)


def read(model: Any, *prompts: Sequence[int]) -> KVCache:
    """A batch's cache that has these prompts."""
    cache = KVCache.empty(model, len(prompts))
    forward.fill(model, cache, prompts)
    return cache


def keep(cache: PrefixCache, model: Any, tokens: Sequence[int], owner: str = "me") -> None:
    cache.store(owner, tokens, read(model, tokens), 0)


def counting(start: int, length: int) -> list[int]:
    return [(start + i * 7) % 64 for i in range(length)]


def nodes(cache: PrefixCache) -> Iterator[Any]:
    stack = list(cache._roots.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


def whole(cache: PrefixCache, most_bytes: int = PLENTY) -> bool:
    """Its sums are right, within the limit, and nothing is kept that leads nowhere."""
    segments = [node.segment for node in nodes(cache) if node.segment is not None]
    leaves = [node for node in nodes(cache) if not node.children]
    assert cache.nbytes == sum(segment.nbytes for segment in segments) <= most_bytes
    assert cache.stats()["prefix_cache_entries"] == len(segments) == len(cache._used)
    assert all(leaf.segment is not None for leaf in leaves)
    return True


def test_a_prefix_is_what_the_model_would_have_read(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    first = counting(1, 40)
    cache.store("me", first, read(model, counting(3, 60), first), 1)
    second = [*first[:29], *counting(50, 20)]
    assert cache.length("me", second) == 29
    length, layers = cache.load("me", second)
    expected = read(model, second[:29]).copy_row(0)
    assert length == 29
    for layer, wanted in zip(layers, expected, strict=True):
        assert layer.offset == 29
        assert mx.allclose(layer.keys, wanted.keys, atol=1e-5)
        assert mx.allclose(layer.values, wanted.values, atol=1e-5)
    assert cache.stats() | {"prefix_cache_bytes": 0} == {
        "prefix_cache_bytes": 0,
        "prefix_cache_entries": 1,
        "prefix_cache_lookups_total": 1,
        "prefix_cache_hits_total": 1,
        "prefix_cache_tokens_total": 29,
    }


def test_what_rows_share_is_kept_once(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    system = counting(1, 100)
    for i in range(10):
        keep(cache, model, [*system, *counting(2 * i, 20)])
    assert cache.nbytes == TOKEN_BYTES * (100 + 10 * 20)
    keep(cache, model, system[:50])
    keep(cache, model, [*system, *counting(0, 20)])
    assert cache.nbytes == TOKEN_BYTES * (100 + 10 * 20)
    assert whole(cache)


def test_a_row_adds_what_is_new_and_a_conversation_goes_on_with_all_of_it(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    said: list[int] = []
    for turn in range(5):
        before = len(said)
        said += counting(turn, 20)
        assert cache.length("me", said) == before
        keep(cache, model, said)
        assert cache.nbytes == TOKEN_BYTES * len(said)


def test_owners_share_nothing(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    tokens = counting(1, 50)
    keep(cache, model, tokens, "me")
    assert cache.length("you", tokens) == 0
    assert cache.load("you", tokens)[0] == 0
    assert cache.length(None, tokens) == 0
    keep(cache, model, tokens, "you")
    assert cache.nbytes == 2 * TOKEN_BYTES * 50
    cache.store(None, tokens, read(model, tokens), 0)
    assert cache.nbytes == 2 * TOKEN_BYTES * 50


def test_what_is_short_is_not_worth_it(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    keep(cache, model, counting(1, MIN_TOKENS - 1))
    assert cache.nbytes == 0
    keep(cache, model, counting(1, MIN_TOKENS))
    assert cache.length("me", counting(1, MIN_TOKENS)) == MIN_TOKENS
    assert cache.length("me", counting(1, MIN_TOKENS - 1)) == 0


def test_the_least_recently_used_goes_first_and_ends_before_beginnings(model: Any) -> None:
    limit = TOKEN_BYTES * 100
    cache = PrefixCache(model, limit)
    system, tails = counting(1, 40), [counting(i, 20) for i in (0, 2, 4)]
    for tail in tails:
        keep(cache, model, [*system, *tail])
    cache.load("me", [*system, *tails[0]])
    keep(cache, model, [*system, *counting(6, 20)])
    assert [cache.length("me", [*system, *tail]) for tail in tails] == [60, 40, 60]
    assert whole(cache, limit)
    cache.set_limit(TOKEN_BYTES * 45)
    assert cache.length("me", [*system, *tails[0]]) == 40
    cache.set_limit(PLENTY)
    keep(cache, model, counting(9, 120))  # more than it may keep at all: the others stay
    assert cache.length("me", [*system, *tails[0]]) == 40
    assert whole(cache, limit)


def test_nothing_is_kept_where_there_is_no_room(model: Any) -> None:
    off, full = PrefixCache(model, 0), PrefixCache(model, PLENTY)
    full.set_limit(0)
    for cache in (off, full):
        keep(cache, model, counting(1, 50))
        assert cache.load("me", counting(1, 50))[0] == 0
        assert cache.nbytes == 0


def test_clearing_forgets_everything(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    keep(cache, model, counting(1, 50))
    cache.clear()
    assert cache.length("me", counting(1, 50)) == 0
    assert cache.nbytes == 0
    assert whole(cache)


@pytest.mark.parametrize("tokens_kept", [60, 300, 100_000])
def test_whatever_comes_it_stays_whole_and_finds_the_longest(model: Any, tokens_kept: int) -> None:
    draw = random.Random(tokens_kept)
    limit = tokens_kept * TOKEN_BYTES
    cache, kept = PrefixCache(model, limit), []
    for _ in range(150):
        begin = draw.choice(kept)[: draw.randrange(80)] if kept and draw.random() < 0.8 else []
        tokens = [*begin, *(draw.randrange(3) for _ in range(draw.randrange(1, 40)))]
        longest = max((common(tokens, other) for other in kept), default=0)
        found, layers = cache.load("me", tokens)
        assert found == layers[0].size()
        assert found <= longest
        if tokens_kept == 100_000:
            assert found == (longest if longest >= MIN_TOKENS else 0)
        keep(cache, model, tokens)
        if len(tokens) >= MIN_TOKENS:
            kept.append(tokens)
        assert whole(cache, limit)


def common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_a_state_is_of_use_at_its_own_place_only(sliding: Any) -> None:
    cache = PrefixCache(sliding, PLENTY)
    tokens = counting(1, 40)
    keep(cache, sliding, tokens)
    assert cache.length("me", tokens[:30]) == 0
    assert cache.length("me", [*tokens[:39], 63, 63]) == 0
    assert cache.length("me", [*tokens, 63, 63]) == 40
    keep(cache, sliding, [*tokens[:30], *counting(5, 10)])
    assert cache.length("me", [*tokens, 63, 63]) == 40
    assert cache.length("me", [*tokens[:30], 63]) == 0
    keep(cache, sliding, tokens[:30])
    assert cache.length("me", [*tokens[:30], 63]) == 30
    assert whole(cache)
    for _ in range(3):  # what it was not used for goes first, whether others begin with it or not
        cache.load("me", tokens)
        cache.set_limit(cache.nbytes - 1)
        assert whole(cache)
    assert cache.nbytes == 0


def test_a_cache_that_cannot_be_taken_apart_costs_nothing_but_the_reuse(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PrefixCache(model, PLENTY)
    keep(cache, model, counting(1, 50))
    monkeypatch.setattr("worker.runner.kv_segments.AttentionSegment.copy_from", lambda *_: 1 / 0)
    keep(cache, model, counting(2, 50))
    keep(cache, model, counting(3, 50))
    assert cache.load("me", counting(1, 50))[0] == 0
    assert len(caplog.records) == 1
    assert whole(cache)


def test_where_memory_ends_what_is_kept_is_given_up(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(model, PLENTY)
    keep(cache, model, counting(1, 50))

    def full(*_: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr("worker.runner.kv_segments.AttentionSegment.copy_from", full)
        keep(cache, model, counting(2, 50))
    assert cache.nbytes == 0
    keep(cache, model, counting(1, 50))
    assert cache.length("me", counting(1, 50)) == 50


def test_what_is_given_to_everybody_serves_all_and_is_kept_when_its_owners_is_forgotten(model: Any) -> None:
    cache = PrefixCache(model, PLENTY)
    tokens = counting(1, 50)
    keep(cache, model, tokens)
    cache.share("me", tokens[:30])
    assert cache.length("you", tokens) == 30
    assert cache.length("me", tokens) == 50
    assert cache.length(None, tokens) == 0
    found, layers = cache.load("you", tokens)
    assert found == 30
    assert mx.allclose(layers[0].keys, read(model, tokens).layers[0].keys[:, :, :30], atol=1e-5)
    keep(cache, model, [*tokens[:30], *counting(9, 20)], "you")
    assert cache.length("me", [*tokens[:30], *counting(9, 20)]) == 30  # nothing of mine is yours
    assert cache.nbytes == TOKEN_BYTES * (50 + 30 + 50)
    cache.share("me", tokens[:30])
    cache.share("me", [*tokens[:40], 1])  # not mine to give
    assert cache.nbytes == TOKEN_BYTES * (50 + 30 + 50)
    assert whole(cache)


def test_a_cache_that_cannot_be_cut_gives_nothing_away(sliding: Any) -> None:
    cache = PrefixCache(sliding, PLENTY)
    keep(cache, sliding, counting(1, 40))
    cache.share("me", counting(1, 40))
    assert cache.length("you", counting(1, 40)) == 0


@pytest.mark.parametrize("length", [2_000, 20_000])
def test_evicting_the_end_of_a_long_prefix_costs_what_is_evicted(
    model: Any, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what comes before it: no more tokens are hashed, and no more nodes visited, for a ten times longer prompt."""
    spill = Spill(PrefixFiles(tmp_path, "model", PLENTY, 1e6), PLENTY // 8)
    cache = PrefixCache(model, PLENTY, spill)
    tokens, width = counting(1, length), 200
    columns = [(mx.zeros((1, 2, length, 4)), mx.zeros((1, 2, length, 4))) for _ in range(2)]
    for end in range(width, length + 1, width):  # as a long prompt is stored along its way
        row = kv_cache.row_of_columns([(keys[:, :, :end], values[:, :, :end]) for keys, values in columns], end)
        cache.store("me", tokens[:end], KVCache.of_rows([row]), 0)
    hashed: list[int] = []
    blocks = BlockChain.blocks
    monkeypatch.setattr(BlockChain, "blocks", lambda chain, some: (hashed.append(len(some)), blocks(chain, some))[1])
    kept = cache.nbytes
    cache.set_limit(kept - 1 + spill.held)
    assert cache.length("me", tokens) == length - width
    assert hashed == [width]
    spill.close(10)
    written = sorted(tmp_path.rglob("*" + SUFFIX))
    assert len(written) == length // BLOCK - (length - width) // BLOCK
