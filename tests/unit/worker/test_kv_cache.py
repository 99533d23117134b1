"""Batch caches grow a layer at a time without changing their content."""

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


def filled(model: Any, tokens: int) -> KVCache:
    """Return a cache of two rows with this many tokens."""
    cache = KVCache.empty(model, 2)
    forward.fill(model, cache, [tuple(i % 64 for i in range(tokens))] * 2)
    return cache


def capacities(cache: KVCache) -> list[int]:
    """Return the number of allocated columns of each layer."""
    return [layer.keys.shape[2] for layer in cache.layers]


def test_layers_grow_one_by_one_before_the_cache_is_full(model: Any) -> None:
    cache = filled(model, 256 - kv_cache.GROW_AHEAD - 1)
    cache.grow_ahead()
    assert capacities(cache) == [256, 256, 256]
    grown = []
    for _ in range(kv_cache.GROW_AHEAD):
        forward.fill(model, cache, [(1,), (2,)])
        cache.grow_ahead()
        grown.append(capacities(cache))
    assert grown[:4] == [[512, 256, 256], [512, 512, 256], [512, 512, 512], [512, 512, 512]]


def test_growing_ahead_changes_no_logits(model: Any) -> None:
    grown, plain = filled(model, 250), filled(model, 250)
    for _ in range(10):
        grown.grow_ahead()
        tokens = mx.array([[3], [4]])
        assert mx.array_equal(model(tokens, cache=grown.layers), model(tokens, cache=plain.layers))


def test_reserve_widens_a_limited_number_of_layers_per_call(model: Any) -> None:
    cache = filled(model, 10)
    steps = []
    while cache.reserve(600, max_layers=2):
        steps.append(capacities(cache))
    assert steps == [[768, 768, 256], [768, 768, 768]]
    assert not cache.reserve(600)
