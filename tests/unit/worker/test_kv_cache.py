"""Caches of several rows grow a layer at a time, and hold what they held."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from tests.support.small_models import small_model
from worker.runner import forward, kv_cache
from worker.runner.kv_cache import KVCache


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama", num_hidden_layers=3)


def read(model: Any, tokens: int) -> KVCache:
    """A cache of two rows with so many tokens."""
    cache = KVCache.empty(model, 2)
    forward.fill(model, cache, [tuple(i % 64 for i in range(tokens))] * 2)
    return cache


def capacities(cache: KVCache) -> list[int]:
    """Columns for which each layer has memory."""
    return [layer.keys.shape[2] for layer in cache.layers]


def test_layers_grow_one_after_the_other_before_the_cache_is_full(model: Any) -> None:
    cache = read(model, 256 - kv_cache.GROW_AHEAD - 1)
    cache.grow_ahead()
    assert capacities(cache) == [256, 256, 256]
    grown = []
    for _ in range(kv_cache.GROW_AHEAD):
        forward.fill(model, cache, [(1,), (2,)])
        cache.grow_ahead()
        grown.append(capacities(cache))
    assert grown[:4] == [[512, 256, 256], [512, 512, 256], [512, 512, 512], [512, 512, 512]]


def test_a_cache_that_grew_ahead_gives_what_one_that_did_not_gives(model: Any) -> None:
    grown, plain = read(model, 250), read(model, 250)
    for _ in range(10):
        grown.grow_ahead()
        tokens = mx.array([[3], [4]])
        assert mx.array_equal(model(tokens, cache=grown.layers), model(tokens, cache=plain.layers))


def test_place_is_made_in_so_many_layers_at_a_time(model: Any) -> None:
    cache = read(model, 10)
    steps = []
    while cache.reserve(600, max_layers=2):
        steps.append(capacities(cache))
    assert steps == [[768, 768, 256], [768, 768, 768]]
    assert not cache.reserve(600)
