"""Batch caches grow a layer at a time without changing their content."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from tests.support import architectures
from tests.support.small_models import small_model
from worker.runner import forward, kv_cache
from worker.runner.column_cache import ColumnCache
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


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5", "falcon_h1", "deepseek_v32"])
def test_a_row_joins_without_a_copy_of_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes the batch index of another one, and has the logits that it has alone."""
    model = architectures.make(name)
    prompts = [[(7 * i + 31 * row) % 256 for i in range(90 + 40 * row)] for row in range(3)]
    batch, joining, alone = KVCache.empty(model, 3), KVCache.empty(model), KVCache.empty(model)
    forward.fill(model, batch, prompts)
    new = [(11 * i + 5) % 256 for i in range(60)]
    for cache in (joining, alone):
        forward.fill(model, cache, [new])
    for cache in (batch, joining):
        cache.fit()
    monkeypatch.setattr(mx, "concatenate", lambda *_: pytest.fail("the batch was copied"))
    assert batch.overwrite([1], joining)
    monkeypatch.undo()
    for step in range(3):
        logits, expected = (
            model(mx.array([[step]] * 3), cache=batch.layers),
            model(mx.array([[step]]), cache=alone.layers),
        )
        assert mx.allclose(logits[1], expected[0], atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "qwen3_5", "lfm2", "deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize("tokens", [100, 600, 1300])
def test_the_memory_of_decoding_rows_is_predicted(name: str, tokens: int) -> None:
    model = architectures.make(name, sliding_window=128, sliding_window_pattern=2)
    cache = KVCache.empty(model, 2)
    forward.fill(model, cache, [[1] * tokens] * 2)
    cache.fit()
    for _ in range(2):
        forward.fill(model, cache, [[1]] * 2)
    predicted = 2 * kv_cache.Footprint.of(model).allocated(tokens)
    assert cache.nbytes <= predicted <= 1.05 * cache.nbytes


def masked(cache: KVCache) -> set[bool]:
    """Return whether the parts use a mask for the next token."""
    return {part.make_mask(1) is not None for part in cache.parts}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "qwen3_5", "falcon_h1"])
def test_rows_without_padding_decode_without_a_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.make(name)
    one, other, long = ([(7 * i + start) % 256 for i in range(tokens)] for start, tokens in ((0, 70), (9, 70), (3, 90)))
    batch, same, more = KVCache.empty(model, 2), KVCache.empty(model, 2), KVCache.empty(model)
    for cache, prompts in ((batch, [one, other]), (same, [one, other]), (more, [long])):
        forward.fill(model, cache, prompts)
        cache.fit()
        assert masked(cache) == {False}
    tokens = mx.array([[1], [2]])
    with monkeypatch.context() as patch:
        original = ColumnCache.make_mask
        patch.setattr(ColumnCache, "make_mask", lambda self, tokens, **_: original(self, tokens, return_array=True))
        expected = model(tokens, cache=same.layers)
    assert mx.allclose(model(tokens, cache=batch.layers), expected, atol=1e-5)
    batch.extend(more)
    assert all(part.make_mask(1) is not None for part in batch.attention)
    batch.keep_rows([2])
    assert masked(batch) == {False}
