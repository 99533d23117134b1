"""Models of a few kilobytes: in memory, as a folder, and as a GGUF file with everything that the conversion reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.model_files.weights import save_weights

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 16, 4, 2, 32, 2
WORDS = ["<|end|>", "<|start|>", "<|stop|>", *"Ġabcdehlo0123456789", "he", "ll", "hell", "hello"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def gguf_metadata() -> dict[str, Any]:
    """Return the metadata of a small llama in GGUF terms."""
    numbers = {
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.vocab_size": len(WORDS),
        "llama.context_length": 128,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
    }
    return {
        **{name: mx.array(number, mx.uint32) for name, number in numbers.items()},
        "llama.rope.freq_base": mx.array(1e4),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * (len(WORDS) - 3), mx.int32),
        "tokenizer.chat_template": TEMPLATE,
    }


def gguf_weights() -> dict[str, mx.array]:
    """Return random weights that match `gguf_metadata`."""
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    kv = HIDDEN * KV_HEADS // HEADS
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (kv, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (FFN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (HIDDEN, FFN)}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    return {
        f"{name}.weight": mx.random.normal(shape, key=mx.random.key(i))
        for i, (name, shape) in enumerate(shapes.items())
    }


def small_model(module: Any, **more: Any) -> Any:
    """Return a model with random weights.

    Args:
        module: the architecture, a module of `mlx_lm.models`.
        more: further values of the configuration.
    """
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return module.Model(
        module.ModelArgs.from_dict({"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "vocab_size": 64, **widths, **more})
    )


def write_gguf(path: Path) -> Path:
    """Write a small llama with random weights as a GGUF file."""
    mx.save_gguf(str(path), gguf_weights(), gguf_metadata())
    return path


def make_folder(path: Path, tensor: str = "weight") -> Path:
    """Create a folder with every file that a model needs, and one weight. Their content is not a valid model."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    save_weights(path / "model.safetensors", {tensor: mx.zeros((4, 4))})
    return path
