"""Shapes of models with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a model.

    Attributes:
        folder: name of its folder below models/.
        config: values in config.json.
        inherits: fields taken from the config.json of the tokenizer's model; None: all that `config` lacks.
        special: special tokens to append to the tokenizer.
        tokenizer: fields to add to tokenizer_config.json.
        files: further files by name; objects are written as JSON.
    """

    name: str
    folder: str
    config: Mapping[str, Any]
    inherits: tuple[str, ...] | None = None
    special: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str | Json] = field(default_factory=dict)

    def config_with(self, base: Json) -> Json:
        """Return the complete config.json; `base` is that of the tokenizer's model."""
        inherited = {name: value for name, value in base.items() if self.inherits is None or name in self.inherits}
        return {name: value for name, value in (inherited | dict(self.config)).items() if name not in _EXCLUDED}


_EXCLUDED = ("quantization", "quantization_config")

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
        # With tied embeddings, a random llama repeats its last token, and such a stream hides mistakes.
        "tie_word_embeddings": False,
    },
)

MID: Final = Shape(
    "mid",
    "mid-random-llama",
    {
        **TINY.config,
        "hidden_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1536,
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

_QWEN_VL_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TINY_VISION: Final = Shape(
    "tiny-vision",
    "tiny-random-qwen2.5-vl",
    {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49156,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vision_start_token_id": 49152,
        "vision_end_token_id": 49153,
        "image_token_id": 49154,
        "video_token_id": 49155,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    },
    inherits=("bos_token_id", "eos_token_id", "pad_token_id"),
    special=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    files={
        "chat_template.jinja": _QWEN_VL_TEMPLATE,
        # As in Qwen2.5-VL, on which UI-TARS-1.5-7B is based.
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    },
)

_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")

_VISION_TEXT: Final[Json] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 49156,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
}

TINY_QWEN3_VL: Final = Shape(
    "tiny-qwen3-vl",
    "tiny-random-qwen3-vl",
    {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "torch_dtype": "float32",
        "vocab_size": 49156,
        "vision_start_token_id": 49152,
        "vision_end_token_id": 49153,
        "image_token_id": 49154,
        "video_token_id": 49155,
        "text_config": {
            **_VISION_TEXT,
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 4,
            "rope_theta": 5000000.0,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    inherits=_TOKENS,
    special=TINY_VISION.special,
    files={
        "chat_template.jinja": _QWEN_VL_TEMPLATE,
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    },
)

TINY_GEMMA3: Final = Shape(
    "tiny-gemma3",
    "tiny-random-gemma3-vision",
    {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "float32",
        "vocab_size": 49156,
        "hidden_size": 64,
        "boi_token_index": 49152,
        "eoi_token_index": 49153,
        "image_token_index": 49154,
        "mm_tokens_per_image": 256,
        "text_config": {
            **_VISION_TEXT,
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 16,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "image_size": 448,
            "patch_size": 14,
        },
    },
    inherits=_TOKENS,
    special=("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<unused>"),
    tokenizer={
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        }
    },
    files={
        "chat_template.jinja": _QWEN_VL_TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>"
        ),
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "image_seq_length": 256,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": 448, "width": 448},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "processor_config.json": {"image_seq_length": 256, "processor_class": "Gemma3Processor"},
    },
)

_WINDOW: Final[Json] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 49152,
    "max_position_embeddings": 32768,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float32",
}
_HYBRID: Final[Json] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5",
    "vocab_size": 49152,
    "max_position_embeddings": 32768,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def _window(name: str, hidden: int, layers: int, window: int) -> Shape:
    """Return a shape with sliding windows in five of six layers."""
    heads = max(hidden // 64, 4)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "query_pre_attn_scalar": hidden // heads,
        "sliding_window": window,
    }
    return Shape(name, f"{name.partition('-')[0]}-random-gemma3", _WINDOW | sizes, inherits=_TOKENS)


def _hybrid(name: str, hidden: int, layers: int, **more: Any) -> Shape:
    """Return a shape with recurrent state in three of four layers."""
    heads = max(hidden // 64, 4)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads,
        "linear_num_value_heads": heads,
        "linear_num_key_heads": heads // 2,
        "linear_key_head_dim": hidden // heads,
        "linear_value_head_dim": hidden // heads,
    }
    return Shape(name, f"{name.partition('-')[0]}-random-qwen3.5", _HYBRID | sizes | more, inherits=_TOKENS)


TINY_WINDOW: Final = _window("tiny-window", 64, 6, 64)
MID_WINDOW: Final = _window("mid-window", 512, 24, 512)
TINY_HYBRID: Final = _hybrid("tiny-hybrid", 128, 4)
MID_HYBRID: Final = _hybrid("mid-hybrid", 512, 24)
HYBRID_7B: Final = _hybrid(
    "7b-hybrid",
    4096,
    32,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=256,
    linear_num_value_heads=32,
    linear_num_key_heads=16,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    vocab_size=152064,
    torch_dtype="bfloat16",
)

_VISION: Final = (TINY_VISION, TINY_QWEN3_VL, TINY_GEMMA3)
_ALL: Final = (TINY, *_VISION, TINY_WINDOW, TINY_HYBRID, MID, MID_WINDOW, MID_HYBRID, QWEN2_5_7B, HYBRID_7B)
SHAPES: Final = {shape.name: shape for shape in _ALL}
