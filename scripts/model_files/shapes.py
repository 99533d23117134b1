"""Shapes of models that are made of random weights: for measuring, where what they say does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's measures.

    Attributes:
        folder: the name its folder gets under models/.
        config: what config.json says.
        inherits: fields that the config.json of the tokenizer's model gives; None: all that `config` does not have.
    """

    name: str
    folder: str
    config: Mapping[str, Any]
    inherits: tuple[str, ...] | None = None

    def config_with(self, given: Json) -> Json:
        """The whole config.json, `given` that of the tokenizer's model."""
        taken = {name: value for name, value in given.items() if self.inherits is None or name in self.inherits}
        return {name: value for name, value in (taken | dict(self.config)).items() if name not in _LEFT_OUT}


_LEFT_OUT = ("quantization", "quantization_config")

TINY: Final = Shape(
    "tiny",
    "tiny-random-llama",
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "torch_dtype": "float32",
        # With tied embeddings a random llama repeats its last token for ever, and a stream of one token hides mistakes.
        "tie_word_embeddings": False,
    },
)

QWEN2_5_7B: Final = Shape(
    "qwen2.5-7b",
    "random-qwen2.5-7b",
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    inherits=("bos_token_id", "eos_token_id", "pad_token_id"),
)

SHAPES: Final = {shape.name: shape for shape in (TINY, QWEN2_5_7B)}
