"""Tiny vision models of GLM and PaddleOCR: rotary positions by rows and columns, in sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.architectures.vision_spec import CLIP, HALF, TEXT, Json, VisionModel

_GLM_IMAGE: Final = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM_TOKENS: Final = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
_GLM_PREPROCESSOR: Final[Json] = {
    "image_processor_type": "Glm4vImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    "do_rescale": True,
    **CLIP,
}


def _glm_tower(kind: str, intermediate: int) -> Json:
    return {
        "model_type": kind,
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": intermediate,
        "num_heads": 4,
        "patch_size": 14,
        "image_size": 112,
        "in_channels": 3,
        "out_hidden_size": 64,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def _glm_config(ids: Mapping[str, int], vocabulary: int, text: Json, vision: Json) -> Json:
    return {
        "text_config": TEXT | {"vocab_size": vocabulary, "eos_token_id": [ids["<|im_end|>"]]} | text,
        "vision_config": vision,
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "image_start_token_id": ids["<|begin_of_image|>"],
        "vision_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_token_index": ids["<|image|>"],
        "video_token_index": ids["<|video|>"],
    }


def _glm4v(ids: Mapping[str, int], vocabulary: int) -> Json:
    text = {
        "model_type": "glm4v_text",
        "head_dim": 16,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 1]},
    }
    return _glm_config(ids, vocabulary, text, _glm_tower("glm4v", 128))


def _glm4v_moe(ids: Mapping[str, int], vocabulary: int) -> Json:
    text = {
        "model_type": "glm4v_moe_text",
        "head_dim": 16,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 2, 1]},
        "use_qk_norm": False,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    return _glm_config(ids, vocabulary, text, _glm_tower("glm4v_moe", 128))


def _glm_ocr(ids: Mapping[str, int], vocabulary: int) -> Json:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0, "rope_theta": 10000.0}
    text = {"model_type": "glm_ocr_text", "head_dim": 16, "attention_bias": False, "rope_parameters": rope}
    tower = _glm_tower("glm_ocr_vision", 64) | {"attention_bias": True}
    return _glm_config(ids, vocabulary, text | {"num_nextn_predict_layers": 0}, tower)


def _paddleocr(ids: Mapping[str, int], vocabulary: int) -> Json:
    tower = {
        "model_type": "paddleocr_vl",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": 112,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}
    return TEXT | {
        "hidden_size": 1024,  # the projector of mlx-vlm has no other size
        "head_dim": 16,
        "vocab_size": vocabulary,
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "use_bias": False,
        "hidden_act": "silu",
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<pad>"],
        "vision_config": tower,
        "image_token_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "video_token_id": ids["<|VIDEO_PLACEHOLDER|>"],
        "vision_start_token_id": ids["<|IMAGE_START|>"],
        "vision_end_token_id": ids["<|IMAGE_END|>"],
    }


_GLM_FILES: Final[Mapping[str, Json]] = {"preprocessor_config.json": _GLM_PREPROCESSOR}

GLM: Final[Mapping[str, VisionModel]] = {
    "glm4v": VisionModel(_glm4v, _GLM_IMAGE, _GLM_TOKENS, _GLM_FILES),
    "glm4v_moe": VisionModel(_glm4v_moe, _GLM_IMAGE, _GLM_TOKENS, _GLM_FILES),
    "glm_ocr": VisionModel(_glm_ocr, _GLM_IMAGE, _GLM_TOKENS, _GLM_FILES),
    "paddleocr_vl": VisionModel(
        _paddleocr,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"),
        {
            "preprocessor_config.json": {
                "image_processor_type": "PaddleOCRVLImageProcessor",
                "min_pixels": 147384,
                "max_pixels": 2822400,
                "patch_size": 14,
                "temporal_patch_size": 1,
                "merge_size": 2,
                **HALF,
            }
        },
        images=1,
    ),
}
"""By `model_type`."""
