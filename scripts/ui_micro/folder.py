"""Writes the model's folder in the format of Qwen2.5-VL and UI-TARS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer

from scripts.model_files.weights import save_weights
from scripts.ui_micro.batches import MEAN, STD
from scripts.ui_micro.shape import MERGE, PATCH
from scripts.ui_micro.tokenizer import END, PAD, SPECIAL

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's template without its system message."""


def write_folder(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, weights: Mapping[str, mx.array]) -> None:
    """Write a folder that `mlx_vlm.load` can load."""
    save_weights(folder / "model.safetensors", weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", config)
    _write(folder / "tokenizer_config.json", _tokenizer_config())
    _write(folder / "preprocessor_config.json", _preprocessor())
    _write(folder / "generation_config.json", _generation(config))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _TEMPLATE,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [token for token in SPECIAL if token not in (END, PAD)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }


def _preprocessor() -> dict[str, Any]:
    side = PATCH * MERGE
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "min_pixels": 4 * side * side,
        "max_pixels": 64 * side * side,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
    }


def _generation(config: dict[str, Any]) -> dict[str, Any]:
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"do_sample": False, "max_new_tokens": 32} | {name: config[name] for name in kept}
