"""What the recipe needs to know about an architecture of vision models."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import mlx.core as mx
import numpy as np
from mlx_vlm.models.rope_utils import rotate_half
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.ui_micro.answers import AnswerFormat

Grid = tuple[int, int]
"""Numbers of rows and columns of patches."""
Json = dict[str, Any]
Ints = NDArray[np.int32]

PATCH: Final = 14
"""Width and height of a patch in pixels."""
MERGE: Final = 2
"""Each image token stands for MERGE x MERGE patches."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Tokens and texts of prompts.

    Attributes:
        special: all special tokens, in the order of their ids.
        end: ends a message.
        pad: fills up a batch.
        assistant: the model's role in the chat template.
        before: text from the start of the prompt to the image tokens.
        after: text from the image tokens to the instruction.
        answer: text from the instruction to the answer.
    """

    special: tuple[str, ...]
    end: str
    pad: str
    assistant: str
    before: str
    after: str
    answer: str


@dataclass(frozen=True, slots=True)
class ImageForm:
    """How the processor prepares images.

    Attributes:
        mean, std: mean and standard deviation with which each colour channel is normalised.
        size: width and height to which each image is resized; None keeps its size.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int] | None = None

    def settings(self) -> Json:
        """Return the part of preprocessor_config.json that all architectures have."""
        return {
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of tokens in training: an image, then several instructions that do not see each other.

    Attributes:
        before: number of tokens before the image.
        rows, columns: image tokens.
        after: number of tokens between the image and the instructions.
        count: number of instructions.
        length: tokens per instruction, including the answer.
    """

    before: int
    rows: int
    columns: int
    after: int
    count: int
    length: int

    @property
    def shared(self) -> int:
        """Number of tokens that precede every instruction."""
        return self.before + self.rows * self.columns + self.after

    def repeated(self, positions: Ints) -> Ints:
        """Return the positions of all tokens, given those of a prompt with one instruction (last axis)."""
        first, rest = positions[..., : self.shared], positions[..., self.shared :]
        return np.concatenate([first, *[rest] * self.count], -1)

    def mask(self) -> NDArray[np.bool_]:
        """Return which tokens (second axis) each token (first axis) sees."""
        block = np.concatenate([np.zeros(self.shared), np.arange(self.count).repeat(self.length) + 1])
        mine = (block[None] == 0) | (block[None] == block[:, None])
        seen: NDArray[np.bool_] = np.tril(np.ones((len(block), len(block)), bool)) & mine
        return seen


class Architecture(Protocol):
    """An architecture in the size of this recipe."""

    @property
    def name(self) -> str:
        """`model_type` in config.json."""

    @property
    def folder(self) -> str:
        """Name of the model's folder."""

    @property
    def tokens(self) -> PromptTokens:
        """The special tokens, and the texts around image and instruction."""

    @property
    def answers(self) -> AnswerFormat:
        """How answers write coordinates."""

    @property
    def image(self) -> ImageForm:
        """How the processor prepares images."""

    def config(self, tokenizer: Tokenizer) -> Json:
        """Return the content of config.json."""

    def files(self) -> Mapping[str, Json]:
        """Return other configuration files of the folder by name."""

    def make_model(self, config: Json) -> Any:
        """Create mlx-vlm's model with random weights."""

    def encode_images(self, model: Any, patches: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
        """Run the vision tower on images of one size as one batch; return states per patch and per image token."""

    def read(self, text: Any, embeddings: mx.array, layout: Layout) -> tuple[mx.array, mx.array]:
        """Run mlx-vlm's language model without its output layer; return the states halfway and at the end."""


def new_model(model_type: str, config: Json) -> Any:
    """Create mlx-vlm's model of a type with random weights."""
    library: Any = importlib.import_module(f"mlx_vlm.models.{model_type}")
    shape = library.ModelConfig.from_dict(dict(config))
    shape.text_config = library.TextConfig.from_dict(shape.text_config)
    shape.vision_config = library.VisionConfig.from_dict(shape.vision_config)
    return library.Model(shape)


def rotated(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Apply the rotary position embedding to queries or keys (last axis: head size)."""
    half: mx.array = rotate_half(x)  # type: ignore[no-untyped-call]  # mlx-vlm has no annotations
    return x * cos + half * sin
