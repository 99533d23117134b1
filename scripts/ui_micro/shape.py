"""The model's architecture: a very small Qwen2.5-VL."""

from __future__ import annotations

import importlib
from typing import Any

from tokenizers import Tokenizer

from scripts.ui_micro.tokenizer import END, IMAGE, PAD, START, VIDEO, VISION_END, VISION_START

PATCH = 14
MERGE = 2


def config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of config.json."""
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 8.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 7, 7]},
        "tie_word_embeddings": True,
        "bos_token_id": token(START),
        "eos_token_id": [token(END), token(PAD)],
        "pad_token_id": token(PAD),
        "image_token_id": token(IMAGE),
        "video_token_id": token(VIDEO),
        "vision_start_token_id": token(VISION_START),
        "vision_end_token_id": token(VISION_END),
        "vision_token_id": token("<|vision_pad|>"),
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "out_hidden_size": 128,
            "num_heads": 4,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2],
        },
    }


def make_model(settings: dict[str, Any]) -> Any:
    """Create mlx-vlm's model with random weights."""
    library: Any = importlib.import_module("mlx_vlm.models.qwen2_5_vl")
    shape = library.ModelConfig.from_dict(dict(settings))
    shape.text_config = library.TextConfig.from_dict(shape.text_config)
    shape.vision_config = library.VisionConfig.from_dict(shape.vision_config)
    return library.Model(shape)
