"""Every cache type of mlx-lm, with rows that join and leave a batch: the tokens equal those of mlx-lm without a batch.

The models have random weights and decode greedily.
"""

from __future__ import annotations

import importlib
import random
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step

from tests.support.runner import row as row_of
from worker.runner import forward
from worker.runner.base import PrefillWork
from worker.runner.cost import UNKNOWN_COST
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import Footprint, KVCache
from worker.runner.length_buckets import LengthBuckets
from worker.runner.prefill import Prefill
from worker.runner.prefix.cache import MIN_TOKENS, PrefixCache
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.verification import Speculation

VOCABULARY = 512
TOKENS = 40
UNLIMITED = 2**30
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {
        **WIDTHS,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {  # two of three layers have a window of 32 tokens
        **WIDTHS,
        "num_hidden_layers": 6,
        "intermediate_size": 128,
        "head_dim": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "gpt_oss": {  # mixture of experts, sliding windows and attention sinks
        **WIDTHS,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "rope_theta": 10000,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mamba2": {  # recurrent state without keys and values
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 16,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": (0.0, 1e9),
        "time_step_rank": "auto",
    },
}


def make(name: str, **more: Any) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **ARCHITECTURES[name], **more}))
    # Larger weights make the answers vary from token to token.
    model.update(tree_map(lambda array: array * 3 if array.ndim == 2 else array, model.parameters()))
    mx.eval(model.parameters())
    return model


def reference(model: Any, prompt: list[int]) -> list[int]:
    """Return the tokens that mlx-lm generates without a batch."""
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS)]


def run_batch(
    model: Any,
    prompts: list[list[int]],
    prefixes: PrefixCache,
    max_padding_bytes: int = UNLIMITED,
    work: tuple[int, int | None] = (32, None),
) -> list[list[int]]:
    """Run all prompts in a batch. A row joins every third step, and every second row leaves early.

    Args:
        work: tokens per chunk, and layers per step (None: all).

    Returns:
        The generated tokens by prompt.
    """
    prefill, speculation = Prefill(model, 32, prefixes, UNKNOWN_COST), Speculation(model, 0, [NgramProposer()])
    batches = LengthBuckets(lambda: DecodeBatch(model, prefixes, speculation), Footprint.of(model), max_padding_bytes)
    generated: list[list[int]] = [[] for _ in prompts]
    waiting = [row_of(i, prompt, TOKENS - 9 * (i % 2), owner="me") for i, prompt in enumerate(prompts)]
    step = 0
    while waiting or prefill.remaining() or len(batches):
        if waiting and step % 3 == 0:
            prefill.add(waiting.pop(0))
        prefilled = prefill.advance(plan(prefill, *work), decoding=len(batches) > 0)
        if prefilled.rows:
            batches.join(prefilled.rows, prefilled.cache)
        for output in batches.step():
            generated[output.uid].append(output.token)
        step += 1
    return generated


def plan(prefill: Prefill, tokens: int, layers: int | None) -> PrefillWork | None:
    """Plan a chunk of the first long prompt, or all short prompts together."""
    remaining = prefill.remaining()
    long = [uid for uid, each in remaining.items() if each.in_progress or each.tokens > 2 * tokens or layers]
    if long:
        return PrefillWork((long[0],), tokens, layers)
    return PrefillWork(tuple(remaining)) if remaining else None


@pytest.mark.parametrize("max_padding_bytes", [UNLIMITED, 50_000], ids=["one bucket", "buckets"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_rows_generate_the_same_tokens_as_single_rows(name: str, max_padding_bytes: int) -> None:
    model, draw = make(name), random.Random(0)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (3, 17, 50, 90, 5, 200, 33)]
    expected = [reference(model, prompt) for prompt in prompts]
    assert all(len(set(answer)) > 10 for answer in expected), "the answers are too uniform to reveal an error"
    results = run_batch(model, prompts, PrefixCache(model, 0), max_padding_bytes)
    for answer, tokens in zip(expected, results, strict=True):
        assert len(tokens) >= TOKENS - 9
        assert tokens == answer[: len(tokens)]


@pytest.mark.parametrize(("name", "layers"), [*((name, 4) for name in ARCHITECTURES), ("mamba2", 1)])
def test_prefill_in_single_layers_gives_the_same_tokens(name: str, layers: int) -> None:
    model, draw = make(name, num_hidden_layers=layers), random.Random(2)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (20, 200, 90)]
    results = run_batch(model, prompts, PrefixCache(model, 0), work=(16, 1))
    for prompt, tokens in zip(prompts, results, strict=True):
        assert tokens == reference(model, prompt)[: len(tokens)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_prefixes_give_the_same_tokens(name: str) -> None:
    """Run the same prompts again, then each with its answer and a new question, like a conversation."""
    model, draw, prefixes = make(name), random.Random(1), PrefixCache(make(name), 2**28)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (3, 17, 50, 90, 5, 200, 33)]
    first = run_batch(model, prompts, prefixes)
    assert run_batch(model, prompts, prefixes) == first
    assert reused(prefixes) == sum(len(prompt) - 1 for prompt in prompts if len(prompt) > MIN_TOKENS)
    longer = [[*prompt, *answer, 1, 2, 3] for prompt, answer in zip(prompts, first, strict=True)]
    before = reused(prefixes)
    for prompt, tokens in zip(longer, run_batch(model, longer, prefixes), strict=True):
        assert tokens == reference(model, prompt)[: len(tokens)]
    assert reused(prefixes) - before == sum(len(prompt) - 4 for prompt in longer)


def reused(prefixes: PrefixCache) -> float:
    return prefixes.stats()["prefix_cache_tokens_total"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [20, 300, 700])
def test_the_predicted_memory_of_a_row_covers_the_allocated_memory(name: str, tokens: int) -> None:
    model = make(name)
    cache = KVCache.empty(model, 3)
    for _ in range(0, tokens, 20):
        forward.fill(model, cache, [[1] * 20] * 3)
    cache.fit()
    for _ in range(2):
        forward.fill(model, cache, [[1]] * 3)
    assert cache.nbytes <= 3 * Footprint.of(model).allocated(tokens) <= 3 * cache.nbytes
