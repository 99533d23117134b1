"""Conversion of weights when a model is loaded: the type, the quantisation, and the vocabulary that results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from shared.models.facts import GROUP
from shared.models.folder import ModelError
from shared.models.registry import ModelCard
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.architectures import make, names
from tests.support.bare_tokenizer import BareTokenizer
from tests.support.runner import row, step
from worker.models.load import LoadedModel, convert, loaded_as
from worker.runner.model_runner import MLXRunner

CAST = ("afmoe", "deepseek_v3", "glm4_moe", "kimi_linear", "nemotron_h", "qwen3_5", "step3p5")
QUANTISED = ("gpt_oss", "granitemoe", "jamba", "lfm2_moe", "longcat_flash", "qwen3_moe", "qwen3_next", "rwkv7")


TOKENIZER = BareTokenizer(limit=512, size=300_000)
"""It has more tokens than any model here."""


def loaded(name: str, **more: Any) -> LoadedModel:
    return LoadedModel(make(name, **more), None, config(name), ModelCard(name, "text", 512), frozenset())


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("name", CAST)
def test_weights_that_a_model_must_not_cast_keep_their_type(name: str) -> None:
    model = loaded(name)
    convert(model, "bfloat16", None)
    may_cast = model.model.cast_predicate
    types = {path: array.dtype for path, array in parameters(model.model).items()}
    kept = {path for path in types if not may_cast(path)}
    assert kept
    assert all(types[path] == (mx.float32 if path in kept else mx.bfloat16) for path in types)


def test_all_weights_of_other_models_are_cast() -> None:
    model = loaded("llama")
    convert(model, "float16", None)
    assert {array.dtype for array in parameters(model.model).values()} == {mx.float16}


@pytest.mark.parametrize("name", ["llama", *QUANTISED])
def test_weights_are_quantised_as_mlx_lm_does(name: str) -> None:
    check_quantisation(name, 4)


@pytest.mark.long
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", names())
def test_weights_of_all_architectures_are_quantised_as_mlx_lm_does(name: str, bits: int) -> None:
    check_quantisation(name, bits)


def check_quantisation(name: str, bits: int) -> None:
    expected, model = make(name), loaded(name)
    try:
        quantize_model(expected, {}, GROUP, bits)
    except (TypeError, ValueError):  # mlx-lm cannot quantise afm7
        with pytest.raises(ModelError, match=f"cannot be quantised to {bits} bits"):
            convert(model, None, bits)
        return
    convert(model, None, bits)
    ours, theirs = parameters(model.model), parameters(expected)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[path], theirs[path]).item() for path in ours)
    assert any(array.dtype == mx.uint32 for array in ours.values())


def test_a_model_with_quantised_weights_stays_as_it_is() -> None:
    model = loaded("llama", bits=4)
    model.config["quantization"] = {"group_size": 32, "bits": 4}
    convert(model, None, 8)
    assert model.config["quantization"]["bits"] == 4


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3n", "gemma4", "longcat_flash_ngram", "mamba", "phixtral", "dbrx"]
)
def test_the_vocabulary_is_the_number_of_rows_of_the_embedding(name: str) -> None:
    assert vocabulary(name, {}) == VOCABULARY


@pytest.mark.parametrize("declared", [{}, {"vocab_size": 7}, {"vocab_size": 10**6}, {"text_config": {}}])
def test_a_wrong_vocabulary_in_the_configuration_does_not_count(declared: dict[str, Any]) -> None:
    assert vocabulary("llama", declared) == VOCABULARY


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_the_vocabulary_of_all_architectures_is_found(name: str) -> None:
    assert vocabulary(name, {}) == config(name)["vocab_size"]


def vocabulary(name: str, declared: dict[str, Any]) -> int | None:
    return card(name, declared, make(name)).vocabulary


def card(name: str, declared: dict[str, Any], model: Any) -> ModelCard:
    return loaded_as("text", Path(name), model, TOKENIZER, declared).card


@pytest.mark.parametrize("bits", [None, 4])
def test_a_token_beyond_the_embedding_is_refused(bits: int | None) -> None:
    model = make("gemma3_text", bits=bits)
    runner = MLXRunner(LoadedModel(model, TOKENIZER, {}, card("gemma3_text", {}, model), frozenset()), 16)
    runner.insert([row(1, [1, VOCABULARY]), row(2, [1, VOCABULARY - 1])])
    output = step(runner)
    assert [(uid, str(error)) for uid, error in output.failed] == [
        (1, f"The prompt contains the token id {VOCABULARY}, but the model has {VOCABULARY} tokens.")
    ]
