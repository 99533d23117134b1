"""Training batches: scenes and instructions as arrays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.ui_micro.drawing import draw
from scripts.ui_micro.instructions import Instruction, answer, instructions
from scripts.ui_micro.scenes import BUTTONS, COLOURS, FIELDS, ICONS, SIZES, Scene, make_scene
from scripts.ui_micro.shape import MERGE, PATCH
from scripts.ui_micro.tokenizer import END, IMAGE, PAD, START, VISION_END, VISION_START

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation with which the processor normalises each colour channel; the same as Qwen's."""

Grid = tuple[int, int]
"""Numbers of rows and columns of patches."""
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

_NAMES = [None, *BUTTONS, *ICONS, *FIELDS]
_COLOURS = [None, "", *COLOURS]
QUESTION_TOKENS = 16
ANSWER_TOKENS = 6
NO_ELEMENT = (0, 0, 0, 0.0, 0.0)


@dataclass(frozen=True)
class Batch:
    """Scenes of one size, with several instructions each."""

    grid: Grid
    patches: Floats
    """Axes: scene, patch, value."""
    ids: Ints
    """Axes: scene, instruction, token; padded at the end."""
    answers: Ints
    """Axes: scene, instruction. Index of the answer's first token in `ids`."""
    targets: Floats
    """Axes: scene, instruction, (x, y). Centre of the target in pixels."""
    labels: Floats
    """Axes: scene, patch, (name, colour, filled, x, y). The element at the patch's centre and its own centre."""


class Batches:
    """Generates batches. The same seed gives the same batch."""

    def __init__(self, tokenizer: Tokenizer, scenes: int, per_scene: int) -> None:
        self._tokenizer = tokenizer
        self._scenes = scenes
        self._per_scene = per_scene

    def make(self, seed: int, by_colour: float) -> Batch:
        """Generate the batch of a seed. `by_colour` is the share of instructions that need the colour, from 0 to 1."""
        rng = random.Random(seed)
        size = rng.choice(SIZES)
        scenes = [make_scene(seed * self._scenes + i, size) for i in range(self._scenes)]
        chosen = [instructions(scene, rng, self._per_scene, by_colour=by_colour) for scene in scenes]
        encoded = [[self._encode(one) for one in row] for row in chosen]
        pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
        return Batch(
            (size[1] // PATCH, size[0] // PATCH),
            to_patches(pixels),
            np.array([[ids for ids, _ in row] for row in encoded], np.int32),
            np.array([[start for _, start in row] for row in encoded], np.int32),
            np.array([[each.target.centre for each in row] for row in chosen], np.float32),
            np.stack([_patch_labels(scene) for scene in scenes]),
        )

    def _encode(self, instruction: Instruction) -> tuple[list[int], int]:
        question = self._tokenizer.encode(f"{instruction.text}{END}\n{START}assistant\n").ids
        reply = self._tokenizer.encode(f"{answer(instruction.target)}{END}").ids
        if len(reply) != ANSWER_TOKENS:
            raise ValueError(f"an answer has {len(reply)} tokens instead of {ANSWER_TOKENS}")
        pad = int(self._tokenizer.token_to_id(PAD) or 0)
        ids = [*question, *reply]
        return ids + [pad] * (QUESTION_TOKENS - len(ids)), len(question)


def to_patches(pixels: NDArray[np.uint8]) -> Floats:
    """Convert images of one size to the processor's patches, with axes scene, patch, value.

    The processor repeats each image as two frames; here there is one.
    """
    n, height, width, _ = pixels.shape
    mean, spread = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)
    scaled: Any = (pixels.astype(np.float32) / np.float32(255) - mean) / spread
    rows, columns, side = height // PATCH // MERGE, width // PATCH // MERGE, PATCH
    parts: Floats = scaled.reshape(n, rows, MERGE, side, columns, MERGE, side, 3)
    return parts.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, rows * columns * MERGE**2, side * side * 3)


def prefix(tokenizer: Tokenizer, images: int) -> list[int]:
    """Return the tokens before every instruction."""
    return list(tokenizer.encode(f"{START}user\n{VISION_START}{IMAGE * images}{VISION_END}").ids)


def positions(before: int, rows: int, columns: int, after: int) -> Ints:
    """Return Qwen's positions (time, height, width) of text, one image, and text after it."""
    text = np.arange(before)[None].repeat(3, 0)
    image = np.indices((1, rows, columns)).reshape(3, -1) + before
    rest = np.arange(after)[None].repeat(3, 0) + before + max(rows, columns)
    return np.concatenate([text, image, rest], 1).astype(np.int32)


def _patch_labels(scene: Scene) -> Floats:
    rows, columns = scene.height // PATCH // MERGE, scene.width // PATCH // MERGE
    order = (
        ((c * MERGE + j + 0.5) * PATCH, (r * MERGE + i + 0.5) * PATCH)
        for r in range(rows)
        for c in range(columns)
        for i in range(MERGE)
        for j in range(MERGE)
    )
    return np.array([_label(scene, x, y) for x, y in order], np.float32)


def _label(scene: Scene, x: float, y: float) -> Sequence[float]:
    for element in scene.elements:
        if element.contains(x, y):
            return (_NAMES.index(element.name), _COLOURS.index(element.colour), int(element.filled), *element.centre)
    return NO_ELEMENT


NAMES = len(_NAMES)
COLOUR_COUNT = len(_COLOURS)
