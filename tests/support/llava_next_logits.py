"""Prints what transformers computes for prompts with images: `python llava_next_logits.py FOLDER < PROMPTS`.

It runs in an environment with torch. The prompts are a JSON list of objects with `text` and `images`, a list of paths.
The output is a JSON list with the log-probabilities of the next token of each prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("", "model."),
)
"""Prefixes of mlx-vlm's names of weights, with those of transformers."""


def main() -> None:
    folder = Path(sys.argv[1])
    model, processor = load(folder)
    print(json.dumps([logprobs(model, processor, **prompt) for prompt in json.load(sys.stdin)]))


def load(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

    model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_pretrained(folder)).eval()
    weights = {}
    for name, array in load_file(folder / "model.safetensors").items():
        old, new = next(pair for pair in PREFIXES if name.startswith(pair[0]))
        in_order = np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array
        weights[new + name.removeprefix(old)] = torch.from_numpy(in_order)
    unused = model.load_state_dict(weights, strict=False)
    missing = [name for name in unused.missing_keys if "position_ids" not in name]
    if missing or unused.unexpected_keys:
        raise ValueError(f"missing {missing}, unexpected {unused.unexpected_keys}")
    return model, LlavaNextProcessor.from_pretrained(folder)


def logprobs(model: Any, processor: Any, text: str, images: list[str]) -> list[float]:
    import torch

    opened = [Image.open(path).convert("RGB") for path in images]
    inputs = processor(images=opened, text=text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    found: list[float] = torch.log_softmax(logits, -1).tolist()
    return found


main()
