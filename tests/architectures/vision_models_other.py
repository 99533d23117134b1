"""Tiny models of families whose layers take image features, or whose language model takes no embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tests.architectures.batches import NO_PADDING_BEHIND
from tests.architectures.vision_spec import HALF, TEXT, Json, VisionModel

_SIDE: Final = 128


def _nemotron_config(ids: Mapping[str, int], vocabulary: int) -> Json:
    text = {
        "model_type": "nemotron_h",
        "vocab_size": vocabulary,
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M*M-",
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 1e9],
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }
    vision = {
        "model_type": "radio",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "max_resolution": 256,
    }
    return {
        "llm_config": TEXT | text,
        "vision_config": vision,
        "vit_hidden_size": 32,
        "projector_hidden_size": 64,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "img_context_token_id": ids["<image>"],
    }


_NEMOTRON: Final = VisionModel(
    _nemotron_config,
    "<image>",
    ("<image>", "<img>", "</img>", "<video>", "<so_embedding>", "<so_start>", "<so_end>"),
    {
        "preprocessor_config.json": {
            "image_processor_type": "NemotronHNanoOmniImageProcessor",
            "norm_mean": [0.48145466, 0.4578275, 0.40821073],
            "norm_std": [0.26862954, 0.26130258, 0.27577711],
            "patch_size": 16,
            "downsample_ratio": 0.5,
            "min_num_patches": 16,
            "max_num_patches": 400,
            "max_model_len": 16384,
        },
        "processor_config.json": {"processor_class": "NemotronHNanoOmniProcessor"},
    },
    batching=NO_PADDING_BEHIND,
)


def _granite_config(ids: Mapping[str, int], vocabulary: int) -> Json:
    text = {
        "model_type": "granitemoehybrid",
        "vocab_size": vocabulary,
        "num_hidden_layers": 6,
        "layer_types": ["attention"] * 6,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 128,
        "attention_bias": False,
        "position_embedding_type": "rope",
        "rope_theta": 1e7,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "residual_multiplier": 0.22,
        "logits_scaling": 1.0,
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": 16,
    }
    return {
        "text_config": TEXT | text,
        "vision_config": vision,
        "vocab_size": vocabulary,
        "image_token_index": ids["<image>"],
        "image_grid_pinpoints": [[_SIDE, _SIDE], [_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]],
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-3, 3], [-2, 2], [-1, 0]],
        "use_spatial_sampling": True,
        "spatial_stride": 2,
        "spatial_vision_layer": -1,
        "spatial_target_layers": [1, 4, 5],
        "use_image_newline_parameter": True,
        "vision_feature_select_strategy": "full",
    }


_GRANITE: Final = VisionModel(
    _granite_config,
    "<image>\n",
    ("<image>",),
    {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "Granite4VisionProcessor",
            "crop_size": {"height": _SIDE, "width": _SIDE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": [[_SIDE, _SIDE], [_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]],
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": _SIDE},
            **HALF,
        },
        "processor_config.json": {
            "processor_class": "Granite4VisionProcessor",
            "patch_size": 16,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "num_additional_image_tokens": 0,
            "downsample_rate": "4/8",
        },
    },
    without=("language_model.lm_head.weight",),
    images=1,
    amplified="out_linear",
)

OTHER: Final[Mapping[str, Any]] = {"nemotron_h_nano_omni": _NEMOTRON, "granite4_vision": _GRANITE}
"""By `model_type`."""
