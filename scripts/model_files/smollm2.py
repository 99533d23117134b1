"""Converts SmolLM2-135M-Instruct from GGUF to a folder that `mlx_lm.load` can load.

The GGUF has 4-bit weights in groups of 32 and an 8-bit embedding, which MLX reads as quantised arrays. `4bit` keeps
them; the other data types dequantise them, which takes more memory and is exact.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.model_files.gguf_tokenizer import tokenizer_config, tokenizer_json
from scripts.model_files.weights import save_weights

_GROUP = 32
_BITS = 4
_EMBEDDING_BITS = 8
_EMBEDDING = "model.embed_tokens"

_NAMES = {
    "token_embd": _EMBEDDING,
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Dtype(StrEnum):
    """Data type of the stored weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FOUR_BIT = "4bit"

    @classmethod
    def for_this_machine(cls) -> Dtype:
        """Return the fastest data type on this machine. On a CPU, only float32 matrix products use BLAS."""
        if platform.system() == "Darwin" and platform.machine() == "arm64":
            return cls.FOUR_BIT
        # False also if the installed MLX cannot use the GPU.
        return cls.BFLOAT16 if mx.cuda.is_available() else cls.FLOAT32


def convert(gguf: Path, folder: Path, dtype: Dtype, progress: Callable[[float], None]) -> None:
    """Write config, weights and tokenizer of `gguf` into `folder`.

    Args:
        gguf: the file to read.
        folder: an existing folder.
        dtype: how to store the weights.
        progress: called with the completed share, from 0 to 1.
    """
    weights, metadata = read_gguf(gguf)
    config = model_config(metadata, dtype)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    converted: dict[str, mx.array] = {}
    modules = list(_modules(weights))
    for done, name in enumerate(modules, start=1):
        converted |= _module(name, weights, dtype, heads)
        mx.eval(converted)
        progress(done / len(modules))
    save_weights(folder / "model.safetensors", converted)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _special_tokens(metadata))
    _write_json(folder / "tokenizer.json", tokenizer_json(metadata))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata, config["max_position_embeddings"]))


def read_gguf(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read weights and metadata."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    weights, metadata = loaded
    return weights, metadata


def model_config(metadata: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """Return the content of `config.json` in the format of Hugging Face's llama."""

    def number(name: str) -> int:
        return int(metadata[f"llama.{name}"])

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        "vocab_size": number("vocab_size"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        # Rounded, because 1e-5 in float32 has a rounding error.
        "rms_norm_eps": float(f"{float(metadata['llama.attention.layer_norm_rms_epsilon']):.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16" if dtype is Dtype.FOUR_BIT else dtype.value,
        **_special_tokens(metadata),
        **(_quantization() if dtype is Dtype.FOUR_BIT else {}),
    }


def hf_name(module: str) -> str:
    """Convert a name: `blk.3.attn_q` becomes `model.layers.3.self_attn.q_proj`."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    return f"model.layers.{layer[1]}.{_NAMES[layer[2]]}" if layer else _NAMES[module]


def unpermute_rows(rows: mx.array, heads: int) -> mx.array:
    """Undo GGUF's row order of the query and key projections.

    For the rotary embedding, GGUF pairs adjacent rows, and Hugging Face's layout pairs rows half a head apart. Only
    whole rows move, so this works for quantised rows and their scales too.
    """
    count, width = rows.shape
    return rows.reshape(heads, count // heads // 2, 2, width).swapaxes(1, 2).reshape(count, width)


def _modules(weights: Mapping[str, mx.array]) -> Iterator[str]:
    return (name.removesuffix(".weight") for name in weights if name.endswith(".weight"))


def _module(
    module: str, weights: Mapping[str, mx.array], dtype: Dtype, heads: Mapping[str, int]
) -> dict[str, mx.array]:
    """Return the arrays of a module with Hugging Face's names and row order, in a data type."""
    name = hf_name(module)
    parts = {
        part: weights[f"{module}.{part}"] for part in ("weight", "scales", "biases") if f"{module}.{part}" in weights
    }
    if rotated := heads.get(name.rpartition(".")[2]):
        parts = {part: unpermute_rows(array, rotated) for part, array in parts.items()}
    if dtype is not Dtype.FOUR_BIT:
        bits = _EMBEDDING_BITS if name == _EMBEDDING else _BITS
        parts = {"weight": _dequantized(parts, bits).astype(mx.float32 if dtype is Dtype.FLOAT32 else mx.bfloat16)}
    elif "scales" not in parts:
        # One data type for all activations: a float32 norm would make all later layers float32.
        parts = {"weight": parts["weight"].astype(mx.float16)}
    return {f"{name}.{part}": array for part, array in parts.items()}


def _dequantized(parts: Mapping[str, mx.array], bits: int) -> mx.array:
    if "scales" not in parts:
        return parts["weight"]
    scales, biases = (parts[part].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(parts["weight"], scales, biases, group_size=_GROUP, bits=bits)


def _quantization() -> dict[str, Any]:
    quantization = {"group_size": _GROUP, "bits": _BITS, _EMBEDDING: {"group_size": _GROUP, "bits": _EMBEDDING_BITS}}
    # mlx-lm reads the first name, other libraries the second.
    return {"quantization": quantization, "quantization_config": quantization}


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    roles = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{role}_token_id": int(metadata[f"tokenizer.ggml.{key}_token_id"]) for role, key in roles.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
