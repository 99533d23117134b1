"""Tiny models whose image features are packed here, because mlx-vlm packs them in another way than they were trained.

What is expected comes from mlx-vlm's encoders, and from the definition of the order of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import mlx.core as mx
import numpy as np
from PIL import Image

from tests.architectures.vision_spec import CLIP, TEXT, Floats, Json, VisionModel

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


TILED: Final[Mapping[str, VisionModel]] = {"llava_next": _llava({"model_type": "mistral"})}
"""By `model_type`, or a variant of one."""
