"""Quantised keys and values: less memory, about the same logits, and a clear error where they are impossible."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from tests.support.architectures import make
from worker.runner import forward
from worker.runner.kv_cache import Footprint, KVCache
from worker.runner.quantized_cache import CannotQuantize, quantize_cache

PROMPTS = [[(7 * i + row) % 256 for i in range(20 + 30 * row)] for row in range(3)]


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.3)])
def test_logits_hardly_change_and_memory_shrinks(bits: int, most: float) -> None:
    plain, quantized = make("llama", head_dim=32), make("llama", head_dim=32)
    quantize_cache(quantized, bits)
    caches = [KVCache.empty(model, len(PROMPTS)) for model in (plain, quantized)]
    logits = [forward.fill(model, cache, PROMPTS) for model, cache in zip((plain, quantized), caches, strict=True)]
    assert logits[0] is not None and logits[1] is not None
    last = [each[2, -1] for each in logits]
    deviation = (mx.abs(last[0] - last[1]).mean() / mx.std(last[0])).item()
    assert 0 < deviation < most
    assert caches[1].nbytes == caches[0].nbytes * (bits + 2) // 32  # with a scale and a bias per 32 numbers
    assert caches[1].nbytes == 3 * Footprint.of(quantized).allocated(80)


def test_windows_keep_their_type() -> None:
    model = make("gemma3_text", head_dim=32)
    quantize_cache(model, 8)
    cache = KVCache.empty(model)
    forward.fill(model, cache, [PROMPTS[0]])
    assert sorted(len(part.arrays) for part in cache.attention) == [2, 2, 6, 6]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "mamba2"])
def test_architectures_that_cannot_use_them_are_refused_and_unchanged(name: str) -> None:
    model = make(name, head_dim=32)
    original = type(model)
    with pytest.raises(CannotQuantize):
        quantize_cache(model, 8)
    assert type(model) is original
