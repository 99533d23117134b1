"""Scenes as the arrays that the model learns from."""

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
"""What the processor takes from each colour and divides by: Qwen's."""

Grid = tuple[int, int]
"""Rows and columns of patches."""
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

_NAMES = [None, *BUTTONS, *ICONS, *FIELDS]
_COLOURS = [None, "", *COLOURS]
QUESTION_TOKENS = 16
ANSWER_TOKENS = 6
NOWHERE = (0, 0, 0, 0.0, 0.0)


@dataclass(frozen=True)
class Batch:
    """Scenes of one size, several instructions each."""

    grid: Grid
    patches: Floats
    """scene, patch, value"""
    ids: Ints
    """scene, instruction, token; padded at the end"""
    answers: Ints
    """scene, instruction: where the answer starts in `ids`"""
    targets: Floats
    """scene, instruction, (x, y): the middle of what is asked for"""
    seen: Floats
    """scene, patch, (name, colour, filling, x, y): what is at the middle of a patch, and where its own middle is"""


class Batches:
    """Makes the batches of a training, the same ones for the same seed."""

    def __init__(self, tokenizer: Tokenizer, scenes: int, per_scene: int) -> None:
        self._tokenizer = tokenizer
        self._scenes = scenes
        self._per_scene = per_scene

    def make(self, seed: int, by_colour: float) -> Batch:
        """The batch of that seed; `by_colour`: in how many of its instructions, of 1, the colour shall decide."""
        rng = random.Random(seed)
        size = rng.choice(SIZES)
        scenes = [make_scene(seed * self._scenes + i, size) for i in range(self._scenes)]
        told = [instructions(scene, rng, self._per_scene, by_colour=by_colour) for scene in scenes]
        encoded = [[self._encode(one) for one in row] for row in told]
        pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
        return Batch(
            (size[1] // PATCH, size[0] // PATCH),
            to_patches(pixels),
            np.array([[ids for ids, _ in row] for row in encoded], np.int32),
            np.array([[start for _, start in row] for row in encoded], np.int32),
            np.array([[each.target.centre for each in row] for row in told], np.float32),
            np.stack([_seen(scene) for scene in scenes]),
        )

    def _encode(self, instruction: Instruction) -> tuple[list[int], int]:
        asked = self._tokenizer.encode(f"{instruction.text}{END}\n{START}assistant\n").ids
        told = self._tokenizer.encode(f"{answer(instruction.target)}{END}").ids
        if len(told) != ANSWER_TOKENS:
            raise ValueError(f"an answer of {len(told)} tokens")
        pad = int(self._tokenizer.token_to_id(PAD) or 0)
        ids = [*asked, *told]
        return ids + [pad] * (QUESTION_TOKENS - len(ids)), len(asked)


def to_patches(pixels: NDArray[np.uint8]) -> Floats:
    """Pictures of one size as the processor's patches (its two equal frames are one here): scene, patch, value."""
    n, height, width, _ = pixels.shape
    mean, spread = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)
    scaled: Any = (pixels.astype(np.float32) / np.float32(255) - mean) / spread
    rows, columns, side = height // PATCH // MERGE, width // PATCH // MERGE, PATCH
    parts: Floats = scaled.reshape(n, rows, MERGE, side, columns, MERGE, side, 3)
    return parts.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, rows * columns * MERGE**2, side * side * 3)


def prefix(tokenizer: Tokenizer, images: int) -> list[int]:
    """What stands before every instruction."""
    return list(tokenizer.encode(f"{START}user\n{VISION_START}{IMAGE * images}{VISION_END}").ids)


def positions(before: int, rows: int, columns: int, after: int) -> Ints:
    """Qwen's positions in time, height and width: of text, of one picture, and of text again."""
    text = np.arange(before)[None].repeat(3, 0)
    place = np.indices((1, rows, columns)).reshape(3, -1) + before
    rest = np.arange(after)[None].repeat(3, 0) + before + max(rows, columns)
    return np.concatenate([text, place, rest], 1).astype(np.int32)


def _seen(scene: Scene) -> Floats:
    rows, columns = scene.height // PATCH // MERGE, scene.width // PATCH // MERGE
    order = (
        ((c * MERGE + j + 0.5) * PATCH, (r * MERGE + i + 0.5) * PATCH)
        for r in range(rows)
        for c in range(columns)
        for i in range(MERGE)
        for j in range(MERGE)
    )
    return np.array([_at(scene, x, y) for x, y in order], np.float32)


def _at(scene: Scene, x: float, y: float) -> Sequence[float]:
    for element in scene.elements:
        if element.contains(x, y):
            return (_NAMES.index(element.name), _COLOURS.index(element.colour), int(element.filled), *element.centre)
    return NOWHERE


NAMES = len(_NAMES)
COLOUR_COUNT = len(_COLOURS)
