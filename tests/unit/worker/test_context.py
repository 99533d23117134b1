"""The context of models whose files declare none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.models import llama, mamba

from tests.support.bare_tokenizer import BareTokenizer
from worker.models.load import FALLBACK_CONTEXT, loaded_as


def context(args: Any, config: dict[str, Any], limit: int = 10**30) -> int:
    tokenizer = BareTokenizer(limit)
    model = SimpleNamespace(args=args, named_modules=list)
    return loaded_as("text", Path("model"), model, tokenizer, {"vocab_size": 8, **config}).card.context


def arguments(module: Any, **more: Any) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    return module.ModelArgs.from_dict({"model_type": "m", "vocab_size": 8, "rms_norm_eps": 1e-5, **sizes, **more})


@pytest.mark.parametrize(
    ("more", "config", "limit", "expected"),
    [
        ({"max_position_embeddings": 2048}, {"max_position_embeddings": 8192}, 512, 8192),
        ({"max_position_embeddings": 2048}, {}, 512, 512),
        ({"max_position_embeddings": 2048}, {}, 10**30, 2048),
        ({}, {}, 10**30, FALLBACK_CONTEXT),
    ],
)
def test_the_library_is_asked_after_the_files(
    more: dict[str, int], config: dict[str, int], limit: int, expected: int
) -> None:
    assert context(arguments(llama, **more), config, limit) == expected


def test_a_model_without_a_limit_on_positions_has_the_fallback() -> None:
    sizes = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 1}
    assert context(arguments(mamba, **sizes), {}) == FALLBACK_CONTEXT >= 32_768


def test_a_model_without_arguments_has_the_fallback() -> None:
    assert context(None, {}) == FALLBACK_CONTEXT
