"""Caches of several rows grow a layer at a time, and hold what they held."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from tests.support.small_models import small_model
from worker.runner import kv_cache as kv


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama", num_hidden_layers=3)


def read(model: Any, tokens: int) -> kv.Layers:
    """A cache of two rows with so many tokens."""
    layers = kv.empty(model, 2)
    kv.feed(model, layers, [tuple(i % 64 for i in range(tokens))] * 2)
    return layers


def capacities(layers: kv.Layers) -> list[int]:
    return [layer.keys.shape[2] for layer in layers]


def test_layers_grow_one_after_the_other_before_the_cache_is_full(model: Any) -> None:
    layers = read(model, 256 - kv.AHEAD - 1)
    kv.grow_ahead(layers)
    assert capacities(layers) == [256, 256, 256]
    grown = []
    for _ in range(kv.AHEAD):
        kv.feed(model, layers, [(1,), (2,)])
        kv.grow_ahead(layers)
        grown.append(capacities(layers))
    assert grown[:4] == [[512, 256, 256], [512, 512, 256], [512, 512, 512], [512, 512, 512]]


def test_a_cache_that_grew_ahead_gives_what_one_that_did_not_gives(model: Any) -> None:
    grown, plain = read(model, 250), read(model, 250)
    for _ in range(10):
        kv.grow_ahead(grown)
        tokens = mx.array([[3], [4]])
        assert mx.array_equal(model(tokens, cache=grown), model(tokens, cache=plain))


def test_place_is_made_in_so_many_layers_at_a_time(model: Any) -> None:
    layers = read(model, 10)
    steps = []
    while kv.reserve(layers, 600, most=2):
        steps.append(capacities(layers))
    assert steps == [[768, 768, 256], [768, 768, 768]]
    assert not kv.reserve(layers, 600)
