"""Each kind of cache that mlx-lm has, under rows that come and go: random weights, greedy, beside mlx-lm alone."""

from __future__ import annotations

import importlib
import random
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step

from tests.support.runner import row as row_of
from worker.runner import forward, kv_cache
from worker.runner.base import UNKNOWN_COST, PrefillWork
from worker.runner.decode import DecodeBatch
from worker.runner.kv_cache import Footprint, KVCache
from worker.runner.length_buckets import LengthBuckets
from worker.runner.prefill import Prefill
from worker.runner.prefix.cache import MIN_TOKENS, PrefixCache
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.verification import Speculation

VOCABULARY = 512
TOKENS = 40
MUCH = 2**30
WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {
        **WIDTHS,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {  # two layers in three look back 32 tokens only
        **WIDTHS,
        "num_hidden_layers": 6,
        "intermediate_size": 128,
        "head_dim": 16,
        "sliding_window": 32,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "gpt_oss": {  # mixture of experts, sliding windows and sinks
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
    "mamba2": {  # a state, no keys and values
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
    # Wider weights give answers that differ from token to token.
    model.update(tree_map(lambda array: array * 3 if array.ndim == 2 else array, model.parameters()))
    mx.eval(model.parameters())
    return model


def alone(model: Any, prompt: list[int]) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS)]


def together(
    model: Any,
    prompts: list[list[int]],
    prefixes: PrefixCache,
    max_padding_bytes: int = MUCH,
    work: tuple[int, int | None] = (32, None),
) -> list[list[int]]:
    """A row joins every third step; every second one leaves early. `work`: tokens and layers of a step's prefill."""
    prefill, speculation = Prefill(model, 32, prefixes, UNKNOWN_COST), Speculation(model, 0, NgramProposer())
    batches = LengthBuckets(lambda: DecodeBatch(model, prefixes, speculation), Footprint.of(model), max_padding_bytes)
    said: list[list[int]] = [[] for _ in prompts]
    waiting = [row_of(i, prompt, TOKENS - 9 * (i % 2), owner="me") for i, prompt in enumerate(prompts)]
    step = 0
    while waiting or prefill.unread() or len(batches):
        if waiting and step % 3 == 0:
            prefill.add(waiting.pop(0))
        planned = planned_for(prefill, *work)
        done = prefill.advance(planned, decoding=len(batches) > 0)
        if done.rows:
            batches.join(done.rows, done.cache)
        for output in batches.step():
            said[output.uid].append(output.token)
        step += 1
    return said


def planned_for(prefill: Prefill, tokens: int, layers: int | None) -> PrefillWork | None:
    """Short prompts together, or a chunk of the first long one."""
    unread = prefill.unread()
    long = [uid for uid, each in unread.items() if each.under_way or each.tokens > 2 * tokens or layers]
    if long:
        return PrefillWork((long[0],), tokens, layers)
    return PrefillWork(tuple(unread)) if unread else None


@pytest.mark.parametrize("max_padding_bytes", [MUCH, 50_000], ids=["one bucket", "buckets"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_says_what_each_row_says_alone(name: str, max_padding_bytes: int) -> None:
    model, draw = make(name), random.Random(0)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (3, 17, 50, 90, 5, 200, 33)]
    expected = [alone(model, prompt) for prompt in prompts]
    assert all(len(set(answer)) > 10 for answer in expected), "answers that would hide a mistake"
    for answer, said in zip(expected, together(model, prompts, PrefixCache(model, 0), max_padding_bytes), strict=True):
        assert len(said) >= TOKENS - 9
        assert said == answer[: len(said)]


@pytest.mark.parametrize(("name", "layers"), [*((name, 4) for name in ARCHITECTURES), ("mamba2", 1)])
def test_a_prompt_that_goes_through_the_model_layer_by_layer_is_read_as_well(name: str, layers: int) -> None:
    model, draw = make(name, num_hidden_layers=layers), random.Random(2)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (20, 200, 90)]
    found = together(model, prompts, PrefixCache(model, 0), work=(16, 1))
    for prompt, said in zip(prompts, found, strict=True):
        assert said == alone(model, prompt)[: len(said)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_goes_on_with_what_earlier_rows_left(name: str) -> None:
    """The same prompts again, then each with its answer and more behind it, as conversations go on."""
    model, draw, prefixes = make(name), random.Random(1), PrefixCache(make(name), 2**28)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (3, 17, 50, 90, 5, 200, 33)]
    first = together(model, prompts, prefixes)
    assert together(model, prompts, prefixes) == first
    assert reused(prefixes) == sum(len(prompt) - 1 for prompt in prompts if len(prompt) > MIN_TOKENS)
    longer = [[*prompt, *said, 1, 2, 3] for prompt, said in zip(prompts, first, strict=True)]
    before = reused(prefixes)
    for prompt, said in zip(longer, together(model, longer, prefixes), strict=True):
        assert said == alone(model, prompt)[: len(said)]
    assert reused(prefixes) - before == sum(len(prompt) - 4 for prompt in longer)


def reused(prefixes: PrefixCache) -> float:
    return prefixes.stats()["prefix_cache_tokens_total"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [20, 300, 700])
def test_what_a_row_needs_is_known_beforehand(name: str, tokens: int) -> None:
    model = make(name)
    cache = KVCache.empty(model, 3)
    for _ in range(0, tokens, 20):
        forward.fill(model, cache, [[1] * 20] * 3)
    assert cache.nbytes <= 3 * Footprint.of(model).allocated(tokens) <= 3 * cache.nbytes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_plain_attention_gives_its_newest_tokens_back(name: str) -> None:
    assert kv_cache.plain(make(name)) == (name == "qwen2")
