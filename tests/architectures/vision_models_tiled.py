"""Tiny models whose image features are packed here, because mlx-vlm packs them in another way than they were trained.

What is expected comes from mlx-vlm's encoders, and from the definition of the order of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_vlm.models import deepseekocr, deepseekocr_2
from PIL import Image

from tests.architectures.vision_spec import CLIP, HALF, TEXT, Floats, Json, VisionModel

_SIDE: Final = 112
_PATCH: Final = 14
_PINPOINTS: Final = [[rows * _SIDE, columns * _SIDE] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def llava_features(model: Any, processor: Any, image: Image.Image) -> Floats:
    """Return the features of an image: all of the whole image, then those of rows that show a part of it."""
    found = processor(images=[image], text=["<image>"])
    tiles, (height, width) = np.array(found["pixel_values"])[0], np.array(found["image_sizes"])[0]
    *_, states = model.vision_tower(mx.array(tiles).transpose(0, 2, 3, 1), output_hidden_states=True)
    of_tile = np.array(model.multi_modal_projector(states[model.vision_feature_layer][:, 1:]))
    grids = [(rows // _SIDE, columns // _SIDE) for rows, columns in _PINPOINTS]
    # The grid that shows the image largest, though not larger than it is; then the one with the least padding.
    shown = [(grid, min(_SIDE * grid[1] / width, _SIDE * grid[0] / height)) for grid in grids]
    kept = {grid: min(int(width * scale) * int(height * scale), width * height) for grid, scale in shown}
    rows, columns = min(grids, key=lambda grid: (-kept[grid], grid[0] * grid[1]))
    side = _SIDE // _PATCH
    scale = min(columns * side / width, rows * side / height)
    first_row = (rows * side - int(round(height * scale, 7))) // 2
    first_column = (columns * side - int(round(width * scale, 7))) // 2
    packed = [*of_tile[0]]
    for row in range(first_row, rows * side - first_row):
        for column in range(first_column, columns * side - first_column):
            tile = 1 + row // side * columns + column // side
            packed.append(of_tile[tile, row % side * side + column % side])
        packed.append(np.array(model.image_newline))
    assert list(np.array(found["input_ids"])[0]).count(processor.image_token_id) == len(packed)
    return np.stack(packed)


def _llava(text: Json) -> VisionModel:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        "projection_dim": 32,
    }

    def config(ids: Mapping[str, int], vocabulary: int) -> Json:
        return {
            "model_type": "llava_next",
            "text_config": TEXT | {"rope_theta": 10000.0, "vocab_size": vocabulary} | text,
            "vision_config": vision,
            "vocab_size": vocabulary,
            "image_grid_pinpoints": _PINPOINTS,
            "image_token_index": ids["<image>"],
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }

    return VisionModel(
        config,
        "<image>\n",
        ("<image>",),
        {
            "preprocessor_config.json": {
                "image_processor_type": "LlavaNextImageProcessor",
                "processor_class": "LlavaNextProcessor",
                "aspect_ratio_setting": "anyres",
                "crop_size": {"height": _SIDE, "width": _SIDE},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_pad": True,
                "do_rescale": True,
                "do_resize": True,
                "image_grid_pinpoints": _PINPOINTS,
                "resample": 3,
                "rescale_factor": 1 / 255,
                "size": {"shortest_edge": _SIDE},
                **CLIP,
            },
            "processor_config.json": {
                "image_token": "<image>",
                "num_additional_image_tokens": 1,
                "patch_size": _PATCH,
                "processor_class": "LlavaNextProcessor",
                "vision_feature_select_strategy": "default",
            },
        },
        features=llava_features,
    )


def _deepseek(name: str, side: int, max_crops: int, hidden: int) -> VisionModel:
    """Return a DeepSeek-OCR.

    Args:
        side: side length of crops in pixels.
        hidden: hidden size of what the first encoder returns.
    """

    def features(model: Any, processor: Any, image: Image.Image) -> Floats:
        crops = {"min_patches": 2 if max(image.size) > side else 0, "max_patches": max_crops}
        found = processor(images=[image], text="<image>", inference_mode=False, **crops)
        names = ("images_spatial_crop", "images_seq_mask")
        inputs = {name: found[name] for name in names}
        embeds = model.get_input_embeddings(found["input_ids"], found["images"], **inputs).inputs_embeds
        return np.array(embeds)[np.array(found["images_seq_mask"])]

    def config(ids: Mapping[str, int], vocabulary: int) -> Json:
        text = {
            **TEXT,
            "model_type": "deepseek_v2",
            "vocab_size": vocabulary,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "kv_lora_rank": None,
            "q_lora_rank": None,
            **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 0),
            "topk_method": "greedy",
            "use_mla": False,
        }
        vision = {
            "model_type": "vision",
            "layers": 1,
            "hidden_size": hidden,
            "intermediate_size": 64,
            "num_attention_heads": 8,
            "width": {},
        }
        return {
            "language_config": text,
            "vision_config": vision,
            "projector_config": {
                "model_type": "mlp_projector",
                "projector_type": "linear",
                "input_dim": 2 * hidden if name == "deepseekocr" else hidden,
                "n_embed": TEXT["hidden_size"],
            },
            "vocab_size": vocabulary,
            "image_token_index": ids["<image>"],
            "tile_tag": "2D",
        }

    return VisionModel(
        config,
        "<image>\n",
        ("<image>",),
        {
            "processor_config.json": {
                "processor_class": "DeepseekVLV2Processor",
                "candidate_resolutions": [[1024, 1024]],
                "downsample_ratio": 4,
                "image_token": "<image>",
                "mask_prompt": False,
                "normalize": True,
                "pad_token": "<pad>",
                "patch_size": 16,
                **HALF,
            }
        },
        features=features,
    )


class SmallEncoder(nn.Module):  # type: ignore[misc,name-defined]
    """Stands in for DeepSeek-OCR's first encoder, which mlx-vlm has only in full size. A token is 64 × 64 pixels."""

    def __init__(self, final_out_chans: int = 1024, **_sizes: Any) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, final_out_chans, 8, 8)
        self.blocks: list[Any] = []

    def __call__(self, pixels: mx.array) -> mx.array:
        views, height, width, channels = pixels.shape
        pixels = pixels.astype(self.patch_embed.proj.weight.dtype)
        small = pixels.reshape(views, height // 8, 8, width // 8, 8, channels).mean(axis=(2, 4))
        found: mx.array = self.patch_embed.proj(small)
        return found


def _make_encoders_small() -> None:
    """Let mlx-vlm build small encoders: it takes their sizes from nowhere but its own defaults."""
    deepseekocr.deepseekocr.SAMEncoder = deepseekocr_2.deepseekocr_2.SAMEncoder = SmallEncoder
    decoder = deepseekocr_2.vision.Qwen2EncoderConfig

    def small(**values: Any) -> Any:
        return decoder(**values | {"layers": 1, "intermediate_size": 64})

    deepseekocr_2.vision.Qwen2EncoderConfig = small


_make_encoders_small()

TILED: Final[Mapping[str, VisionModel]] = {
    "llava_next": _llava({"model_type": "mistral"}),
    "deepseekocr": _deepseek("deepseekocr", 640, 9, 1024),
    "deepseekocr_2": _deepseek("deepseekocr_2", 768, 6, 896),
}
"""By `model_type`, or a variant of one."""

STAND_INS: Final = frozenset({"deepseekocr", "deepseekocr_2"})
"""Models with a small encoder in place of their own, which only this process has: no worker can load their folders."""
