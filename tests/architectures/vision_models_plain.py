"""Tiny models of families whose image tokens have plain positions, with the real settings of their processors.

Sizes of images and tiles are smaller than in real models, to be quick: all else is as in the published folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.architectures.vision_spec import CLIP, HALF, TEXT, Json, VisionModel

Ids = Mapping[str, int]

_IMAGENET: Final[Json] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SETTINGS: Final[Json] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
}
_SIDE: Final = 112
"""Side length of images and tiles, in pixels, where a model has a fixed one."""
_SOFT_TOKENS: Final = 16
"""Tokens of an image or a tile of this size."""


def _model(
    image: str,
    tokens: tuple[str, ...],
    text: Callable[[int], Json],
    vision: Json,
    top: Callable[[Ids], Json],
    files: Mapping[str, Json],
    section: str = "text_config",
    **fields: Any,
) -> VisionModel:
    """Return a model.

    Args:
        image: what the chat template writes for an image.
        text, vision: sections of config.json; the text's is given the size of the vocabulary.
        top: other values of config.json, given the ids of special tokens.
        files: settings of the processor by file, without the suffix.
        section: name of the text's section.
    """

    def config(ids: Ids, vocabulary: int) -> Json:
        return {
            section: TEXT | {"rope_theta": 10000.0, "vocab_size": vocabulary} | text(vocabulary),
            "vision_config": _vision(**vision),
            "vocab_size": vocabulary,
            **top(ids),
        }

    return VisionModel(config, image, tokens, {f"{name}.json": content for name, content in files.items()}, **fields)


def _vision(**more: Any) -> Json:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {**sizes, "num_channels": 3, **more}


def _text(**values: Any) -> Callable[[int], Json]:
    return lambda _vocabulary: values


_PIXTRAL_TOKENS: Final[Json] = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}


def _pixtral(text: Json, patch: int, longest: int, **top: Any) -> VisionModel:
    return _model(
        "[IMG]",
        tuple(_PIXTRAL_TOKENS.values()),
        _text(head_dim=16, **text),
        {"model_type": "pixtral", "image_size": longest, "patch_size": patch, "head_dim": 16, "rope_theta": 10000.0},
        lambda ids: {"image_token_index": ids["[IMG]"], "vision_feature_layer": -1, **top},
        {
            "preprocessor_config": {
                "image_processor_type": "PixtralImageProcessor",
                "processor_class": "PixtralProcessor",
                "patch_size": {"height": patch, "width": patch},
                "resample": 3,
                "size": {"longest_edge": longest},
                **_SETTINGS,
                **CLIP,
            },
            "processor_config": {"patch_size": patch, "processor_class": "PixtralProcessor", **_PIXTRAL_TOKENS},
        },
    )


_MISTRAL3: Final[Json] = {"model_type": "mistral3", "spatial_merge_size": 2, "multimodal_projector_bias": False}
_YARN: Final[Json] = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    # Real models have 0.1 and 16384: here, the scale of attention grows within a short prompt.
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 64,
}

_LFM2: Final = _model(
    "<image>",
    (
        *("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11)),
    ),
    _text(
        model_type="lfm2", norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=64, block_ff_dim=128,
        block_multiple_of=32, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"], tie_word_embeddings=True,
    ),
    {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 256},
    lambda ids: {
        "image_token_id": ids["<image>"],
        "projector_hidden_size": 64,
        "downsample_factor": 2,
        "encoder_patch_size": 16,
        "tile_size": 512,
        "vision_feature_layer": -1,
    },
    {
        "preprocessor_config": {
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "processor_class": "Lfm2VlProcessor",
            "do_image_splitting": True,
            "downsample_factor": 2,
            "encoder_patch_size": 16,
            "max_image_tokens": 256,
            "max_num_patches": 1024,
            "max_pixels_tolerance": 2.0,
            "max_tiles": 10,
            "min_image_tokens": 64,
            "min_tiles": 2,
            "resample": 2,
            "size": {"height": 512, "width": 512},
            "tile_size": 512,
            "use_thumbnail": True,
            **_SETTINGS,
            **HALF,
        },
        "processor_config": {"processor_class": "Lfm2VlProcessor", "use_image_special_tokens": True},
    },
    amplified="multi_modal_projector.linear_2",
)  # fmt: skip

_INTERNVL_CHAT: Final = _model(
    "<image>\n",
    ("<img>", "</img>", "<IMG_CONTEXT>"),
    _text(model_type="qwen2"),
    {"model_type": "intern_vit_6b", "image_size": _SIDE, "patch_size": 14},
    lambda ids: {
        "image_token_index": ids["<IMG_CONTEXT>"],
        "downsample_ratio": 0.5,
        "force_image_size": _SIDE,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "use_thumbnail": True,
    },
    {
        "preprocessor_config": {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 448,
            "resample": 3,
            **_IMAGENET,
        }
    },
)

_INTERNVL: Final = _model(
    "<IMG_CONTEXT>\n",
    ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    _text(model_type="qwen3", head_dim=16),
    {"model_type": "internvl_vision", "image_size": [_SIDE, _SIDE], "patch_size": [14, 14]},
    lambda ids: {
        "image_token_id": ids["<IMG_CONTEXT>"],
        "downsample_ratio": 0.5,
        "image_seq_length": _SOFT_TOKENS,
        "max_dynamic_patch": 6,
    },
    {
        "preprocessor_config": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": False,
            "max_patches": 12,
            "min_patches": 1,
            "resample": 3,
            "size": {"height": _SIDE, "width": _SIDE},
            **_SETTINGS,
            **_IMAGENET,
        },
        "processor_config": {"image_seq_length": _SOFT_TOKENS, "processor_class": "InternVLProcessor"},
    },
)

_IDEFICS_TOKENS: Final = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def _idefics(name: str, vision: str) -> VisionModel:
    return _model(
        "<image>",
        _IDEFICS_TOKENS,
        _text(model_type="llama"),
        {"model_type": vision, "image_size": _SIDE, "patch_size": 14},
        lambda ids: {"image_token_id": ids["<image>"], "scale_factor": 2},
        {
            "preprocessor_config": {
                "image_processor_type": f"{name}ImageProcessor",
                "processor_class": f"{name}Processor",
                "do_image_splitting": True,
                "do_pad": True,
                "max_image_size": {"longest_edge": _SIDE},
                "resample": 1,
                "size": {"longest_edge": 4 * _SIDE},
                **_SETTINGS,
                **HALF,
            },
            "processor_config": {"image_seq_len": _SOFT_TOKENS, "processor_class": f"{name}Processor"},
        },
    )


_LLAVA: Final = _model(
    "<image>\n",
    ("<image>",),
    _text(model_type="llama"),
    {"model_type": "clip_vision_model", "image_size": _SIDE, "patch_size": 14, "projection_dim": 32},
    lambda ids: {
        "image_token_index": ids["<image>"],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    {
        "preprocessor_config": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "crop_size": {"height": _SIDE, "width": _SIDE},
            "do_center_crop": True,
            "resample": 3,
            "size": {"shortest_edge": _SIDE},
            **_SETTINGS,
            **CLIP,
        },
        "processor_config": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    },
)

_KIMI: Final = _model(
    "<|media_start|>image<|media_content|><|media_pad|><|media_end|>",
    ("<|media_start|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"),
    _text(
        model_type="deepseek_v3", moe_intermediate_size=32, n_shared_experts=1, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, kv_lora_rank=32, q_lora_rank=None,
        qk_rope_head_dim=8, v_head_dim=32, qk_nope_head_dim=32, first_k_dense_replace=1, topk_method="noaux_tc",
        scoring_func="sigmoid", norm_topk_prob=True, moe_layer_freq=1, num_key_value_heads=4,
    ),
    {
        "model_type": "moonvit",
        "num_heads": 2,
        "depth": 2,
        "embed_dim": 32,
        "patch_size": 14,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
    },
    lambda ids: {"media_placeholder_token_id": ids["<|media_pad|>"]},
    {
        "preprocessor_config": {
            "image_processor_type": "KimiVLImageProcessor",
            "in_token_limit": 4096,
            "merge_kernel_size": [2, 2],
            "num_pooled_tokens": 1024,
            "pad_input": True,
            "patch_size": 14,
            **HALF,
        }
    },
    min_side=28,
    quantised_tolerance=0.5,  # mlx-lm quantises the projections of latent keys and values once more
)  # fmt: skip

PLAIN: Final[Mapping[str, VisionModel]] = {
    "pixtral": _pixtral({"model_type": "mistral"}, 16, 1024),
    "mistral3": _pixtral({"model_type": "mistral"}, 14, 1540, **_MISTRAL3),
    "ministral3": _pixtral({"model_type": "ministral3", "rope_parameters": _YARN}, 14, 1540, **_MISTRAL3),
    "lfm2_vl": _LFM2,
    "internvl_chat": _INTERNVL_CHAT,
    "internvl": _INTERNVL,
    "idefics3": _idefics("Idefics3", "idefics3_vision"),
    "smolvlm": _idefics("SmolVLM", "smolvlm_vision"),
    "llava": _LLAVA,
    "kimi_vl": _KIMI,
}
"""By `model_type`, or a variant of one."""
