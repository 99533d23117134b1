"""Tiny models of Gemma's families, with the real settings of their processors but for the sizes of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tests.architectures.vision_spec import HALF, TEXT, Json, VisionModel

Ids = Mapping[str, int]

_SIDE: Final = 112
_GEMMA3_TOKENS: Final[Json] = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_GEMMA4_TOKENS: Final[Json] = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
_GEMMA4_SOFT_TOKENS: Final = 70


def _gemma3_config(ids: Ids, vocabulary: int) -> Json:
    text = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 64,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "mm_tokens_per_image": 16,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": 14,
    }
    return {
        "text_config": TEXT | text,
        "vision_config": vision,
        "vocab_size": vocabulary,
        "hidden_size": TEXT["hidden_size"],
        "mm_tokens_per_image": 16,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
        "pad_token_id": ids["<pad>"],
    }


_GEMMA3_FILES: Final[Mapping[str, Json]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_seq_length": 16,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": _SIDE, "width": _SIDE},
        **HALF,
    },
    "processor_config.json": {"image_seq_length": 16, "processor_class": "Gemma3Processor"},
}
_GEMMA4_FILES: Final[Mapping[str, Json]] = {
    "processor_config.json": {
        "processor_class": "Gemma4Processor",
        "image_seq_length": _GEMMA4_SOFT_TOKENS,
        "image_processor": {
            "image_processor_type": "Gemma4ImageProcessor",
            "do_convert_rgb": True,
            "do_normalize": False,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
            "max_soft_tokens": _GEMMA4_SOFT_TOKENS,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
    }
}


def _gemma4(**text: Any) -> VisionModel:
    def config(ids: Ids, vocabulary: int) -> Json:
        common = {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": False,
            "sliding_window": 64,
            "sliding_window_pattern": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
            "tie_word_embeddings": True,
        }
        vision = {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 16,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 1024,
            "default_output_length": _GEMMA4_SOFT_TOKENS,
            "standardize": True,
        }
        return {
            "model_type": "gemma4",
            "text_config": TEXT | common | text,
            "vision_config": vision,
            "audio_config": None,
            "vocab_size": vocabulary,
            "vision_soft_tokens_per_image": _GEMMA4_SOFT_TOKENS,
            "image_token_id": ids["<|image|>"],
            "audio_token_id": ids["<|audio|>"],
            "video_token_id": ids["<|video|>"],
            "boi_token_id": ids["<|image>"],
            "eoi_token_id": ids["<image|>"],
            "pad_token_id": ids["<pad>"],
        }

    tokens = (*_GEMMA4_TOKENS.values(), "<|video|>")
    special = {"extra_special_tokens": _GEMMA4_TOKENS}
    return VisionModel(config, "<|image|>", tokens, _GEMMA4_FILES, special, amplified="embed_vision")


GEMMA: Final[Mapping[str, VisionModel]] = {
    "gemma3": VisionModel(
        _gemma3_config,
        "<start_of_image>",
        tuple(_GEMMA3_TOKENS.values()),
        _GEMMA3_FILES,
        {"extra_special_tokens": _GEMMA3_TOKENS},
        without=("language_model.lm_head.weight",),
    ),
    # The large models, in which the tokens of an image attend to each other.
    "gemma4": _gemma4(num_kv_shared_layers=0, hidden_size_per_layer_input=0, use_bidirectional_attention="vision"),
    # The E models, with inputs of each layer and layers that share keys.
    "gemma4_e": _gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8, use_double_wide_mlp=True),
}
"""By `model_type`, or a variant of one."""
