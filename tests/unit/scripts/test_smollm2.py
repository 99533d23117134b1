"""Conversion of a small synthetic model from GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from scripts.model_files.gguf_tokenizer import tokenizer_config, tokenizer_json
from scripts.model_files.smollm2 import Dtype, convert, hf_name, unpermute_rows
from shared.models.folder import check_folder
from tests.support.small_models import TEMPLATE, WORDS, gguf_metadata, gguf_weights, write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


def ignore(_part: float) -> None:
    pass


def test_converted_folder_is_complete_and_loads(gguf: Path, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    parts: list[float] = []
    convert(gguf, tmp_path, Dtype.FLOAT32, parts.append)
    check_folder(tmp_path)
    model, config = load_model(tmp_path)

    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, len(WORDS))
    assert (config["rms_norm_eps"], config["eos_token_id"]) == (1e-5, 2)


@pytest.mark.parametrize(("dtype", "stored"), [(Dtype.FLOAT32, mx.float32), (Dtype.BFLOAT16, mx.bfloat16)])
def test_weights_keep_their_values_under_new_names(gguf: Path, tmp_path: Path, dtype: Dtype, stored: mx.Dtype) -> None:
    convert(gguf, tmp_path, dtype, ignore)
    loaded: Any = mx.load(str(tmp_path / "model.safetensors"))
    original = gguf_weights()

    assert {array.dtype for array in loaded.values()} == {stored}
    assert len(loaded) == len(original)
    for old, new in [("blk.1.ffn_down", "model.layers.1.mlp.down_proj"), ("token_embd", "model.embed_tokens")]:
        assert mx.array_equal(loaded[f"{new}.weight"], original[f"{old}.weight"].astype(stored))


def test_names_are_converted() -> None:
    assert hf_name("blk.12.attn_q") == "model.layers.12.self_attn.q_proj"
    assert hf_name("output_norm") == "model.norm"


def test_ggufs_row_order_is_undone() -> None:
    heads, half, width = 3, 4, 5
    rows = mx.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    # The permutation of llama.cpp's converter.
    permuted = rows.reshape(heads, 2, half, width).swapaxes(1, 2).reshape(rows.shape)

    assert not mx.array_equal(permuted, rows)
    assert mx.array_equal(unpermute_rows(permuted, heads), rows)


def test_tokenizer_splits_digits_and_merges_the_rest() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(gguf_metadata())))

    assert tokenizer.encode("hello 12").tokens == ["hello", "Ġ", "1", "2"]
    assert tokenizer.encode("<|start|>hello<|stop|>").ids == [1, WORDS.index("hello"), 2]
    assert tokenizer.decode(tokenizer.encode("hello 12 bad").ids) == "hello 12 bad"


def test_tokenizer_config_names_tokens_and_template() -> None:
    config = tokenizer_config(gguf_metadata(), 128)

    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|start|>", "<|stop|>", "<|stop|>")
    assert config["chat_template"] == TEMPLATE


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="gpt2/qwen2"):
        tokenizer_json(gguf_metadata() | {"tokenizer.ggml.pre": "qwen2"})
