"""What describes a tiny vision model, and values that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from worker.runner.batching.support import UNRESTRICTED, BatchingSupport

Json: TypeAlias = dict[str, Any]
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.floating[Any]]]"

TEXT: Final[Json] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
"""Sizes of the language models."""

CLIP: Final[Json] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF: Final[Json] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A tiny model of a family.

    Attributes:
        config: makes config.json, given the ids of the special tokens and the size of the vocabulary.
        image: what the chat template writes for an image.
        tokens: special tokens of images.
        files: other files by name.
        tokenizer: further values of tokenizer_config.json.
        min_side: minimum side length of images, in pixels; smaller ones are refused.
        without: weights that real folders do not have.
        images: how many images of a prompt mlx-vlm reads at most, for comparisons.
        quantised_tolerance: differences of log-probabilities between quantised models of mlx-lm and mlx-vlm.
        batching: how its rows may share passes.
        features: returns the features [tokens, hidden size] of an image, given mlx-vlm's model and processor; None if
            mlx-vlm itself computes what the model was trained for.
        amplified: part of the names of weights that are multiplied, so that tokens depend on the images.
    """

    config: Callable[[Mapping[str, int], int], Json]
    image: str
    tokens: tuple[str, ...]
    files: Mapping[str, Json]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    min_side: int = 1
    without: tuple[str, ...] = ()
    features: Callable[[Any, Any, Image.Image], Floats] | None = None
    amplified: str | None = None
    images: int = 2
    quantised_tolerance: float = 0.01
    batching: BatchingSupport = UNRESTRICTED
