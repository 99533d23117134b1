"""Models with random weights: configuration, tokenizer and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

from scripts.model_files import random_weights
from scripts.model_files.make_tiny_model import make_tiny_model
from scripts.model_files.shapes import QWEN2_5_7B, SHAPES, TINY
from scripts.model_files.smollm2 import Dtype, convert
from scripts.model_files.vocabulary import pad_vocabulary
from shared.models.folder import ModelError, check_folder
from tests.bench.bandwidth import bytes_per_token, limit, lines
from tests.support.small_models import TEMPLATE, WORDS, write_gguf

SHRUNKEN = replace(
    QWEN2_5_7B,
    config={
        **QWEN2_5_7B.config,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    },
)


@pytest.fixture
def tokenizer_from(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    convert(write_gguf(tmp_path / "model.gguf"), folder, Dtype.FLOAT32, lambda _: None)
    return folder


def test_the_tiny_shape_keeps_the_vocabulary_and_drops_the_quantization() -> None:
    tiny = TINY.config_with({"vocab_size": 9, "hidden_size": 576, "quantization": {}, "quantization_config": {}})

    assert (tiny["vocab_size"], tiny["hidden_size"]) == (9, 64)
    assert not {"quantization", "quantization_config"} & set(tiny)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("tiny-window", 0.03), ("mid-window", 0.6), ("tiny-hybrid", 0.05), ("mid-hybrid", 0.7), ("7b-hybrid", 16)],
)
def test_a_shape_of_another_kind_can_be_built(name: str, gigabytes: float) -> None:
    config = SHAPES[name].config_with({"model_type": "llama", "mlp_bias": False, "eos_token_id": 2})
    assert random_weights.size(config) / 1e9 == pytest.approx(gigabytes, rel=0.3)


def test_a_complete_shape_inherits_only_the_special_tokens() -> None:
    config = QWEN2_5_7B.config_with({"model_type": "llama", "vocab_size": 9, "eos_token_id": 2, "mlp_bias": False})

    assert (config["model_type"], config["vocab_size"], config["eos_token_id"]) == ("qwen2", 152064, 2)
    assert "mlp_bias" not in config


def test_qwens_shape_has_the_right_number_of_parameters() -> None:
    assert random_weights.size(QWEN2_5_7B.config) == 2 * 7_615_616_512  # bfloat16; the weights are not computed


def test_a_model_is_written_in_shards_that_load_as_one(tokenizer_from: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    make_tiny_model(target, tokenizer_from, SHRUNKEN, shard_bytes=40_000)
    check_folder(target)
    model, tokenizer = load(str(target))[:2]
    files = sorted(path.name for path in target.glob("*.safetensors"))

    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((target / name).stat().st_size < 45_000 for name in files)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 100)
    assert model.lm_head.weight.dtype == mx.bfloat16
    assert tokenizer.decode([WORDS.index("hello")]) == "hello"
    assert tokenizer.decode([99])  # a token that the tokenizer lacked


def test_shards_are_the_weights_that_one_file_would_have(tokenizer_from: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "one", tokenizer_from, SHRUNKEN)
    make_tiny_model(tmp_path / "many", tokenizer_from, SHRUNKEN, shard_bytes=40_000)
    one: dict[str, Any] = mx.load(str(tmp_path / "one/model.safetensors"))
    many: dict[str, Any] = {}
    for path in (tmp_path / "many").glob("*.safetensors"):
        many |= mx.load(str(path))

    assert one.keys() == many.keys()
    assert all(mx.array_equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"] == random_weights.size(SHRUNKEN.config) == sum(a.nbytes for a in one.values())
    )


def test_only_one_shard_is_in_memory(tokenizer_from: Path, tmp_path: Path) -> None:
    wide = replace(SHRUNKEN, config={**SHRUNKEN.config, "num_hidden_layers": 40, "hidden_size": 256})
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    make_tiny_model(tmp_path / "wide", tokenizer_from, wide, shard_bytes=500_000)

    assert mx.get_peak_memory() - before < random_weights.size(wide.config) / 3


def test_a_model_is_written_again_only_for_another_shape(tokenizer_from: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    make_tiny_model(target, tokenizer_from, SHRUNKEN)
    first = (target / "model.safetensors").stat().st_ino
    make_tiny_model(target, tokenizer_from, SHRUNKEN)
    assert (target / "model.safetensors").stat().st_ino == first

    make_tiny_model(target, tokenizer_from, TINY)
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"


def test_a_tokenizer_of_the_right_size_is_not_changed(tokenizer_from: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "made", tokenizer_from, TINY)

    assert (tmp_path / "made/tokenizer.json").read_bytes() == (tokenizer_from / "tokenizer.json").read_bytes()
    assert load(str(tmp_path / "made"))[1].chat_template == TEMPLATE


def test_a_tokenizer_with_too_many_tokens_is_refused() -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7}]}

    with pytest.raises(ModelError, match="8 tokens, the model only 4"):
        pad_vocabulary(tokenizer, 4)
    assert set(pad_vocabulary(tokenizer, 10)["model"]["vocab"].values()) == set(range(10)) - {7}
    with pytest.raises(ModelError, match="another kind"):
        pad_vocabulary({"model": {"vocab": [["a", 0.5]]}}, 4)


def test_an_untied_embedding_is_not_read_for_each_token(tokenizer_from: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "untied", tokenizer_from, SHRUNKEN, shard_bytes=40_000)
    tied = replace(SHRUNKEN, config={**SHRUNKEN.config, "tie_word_embeddings": True})
    make_tiny_model(tmp_path / "tied", tokenizer_from, tied)

    embedding = 100 * 64 * 2
    assert bytes_per_token(tmp_path / "untied") == random_weights.size(SHRUNKEN.config) - embedding
    assert bytes_per_token(tmp_path / "tied") == random_weights.size(tied.config)


def test_the_speed_limit_is_the_memory_bandwidth_per_token(tokenizer_from: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "made", tokenizer_from, SHRUNKEN)
    read = bytes_per_token(tmp_path / "made")
    found = limit(tmp_path / "made", {"copy": 50.0 * read, "matrix_vector": 100.0 * read})

    assert found == {"bytes_per_token": read, "bytes_per_s": 100.0 * read, "tokens_per_s": 100.0}
    assert "made: 0.000 GB of weights per token, at most 100.0 tokens/s for one client" in lines({"made": found})
