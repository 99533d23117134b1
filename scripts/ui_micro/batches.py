"""Training batches: scenes and instructions as arrays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from scripts.ui_micro.architectures.architecture import MERGE, PATCH, Architecture, Grid, ImageForm, Ints
from scripts.ui_micro.drawing import draw
from scripts.ui_micro.instructions import Instruction, instructions
from scripts.ui_micro.scenes import BUTTONS, COLOURS, FIELDS, ICONS, SIZES, Scene, make_scene

Floats = NDArray[np.float32]

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
    """Axes: scene, instruction, (x, y). Centre of the target in pixels of the resized image."""
    labels: Floats
    """Axes: scene, patch, (name, colour, filled, x, y). The element at the patch's centre and its own centre."""


class Batches:
    """Generates batches. The same seed gives the same batch."""

    def __init__(self, architecture: Architecture, tokenizer: Tokenizer, scenes: int, per_scene: int) -> None:
        self._architecture = architecture
        self._tokenizer = tokenizer
        self._scenes = scenes
        self._per_scene = per_scene

    def make(self, seed: int, by_colour: float) -> Batch:
        """Generate the batch of a seed. `by_colour` is the share of instructions that need the colour, from 0 to 1."""
        rng = random.Random(seed)
        size = rng.choice(SIZES)
        scenes = [make_scene(seed * self._scenes + i, size) for i in range(self._scenes)]
        chosen = [instructions(scene, rng, self._per_scene, by_colour=by_colour) for scene in scenes]
        encoded = [[self._encode(one, scene) for one in row] for scene, row in zip(scenes, chosen, strict=True)]
        form = self._architecture.image
        width, height = form.size or size
        scale = np.array([width / size[0], height / size[1]])
        centres = np.array([[each.target.centre for each in row] for row in chosen], np.float32)
        return Batch(
            (height // PATCH, width // PATCH),
            to_patches([draw(scene) for scene in scenes], form),
            np.array([[ids for ids, _ in row] for row in encoded], np.int32),
            np.array([[start for _, start in row] for row in encoded], np.int32),
            centres * scale.astype(np.float32),
            np.stack([_patch_labels(scene, scale) for scene in scenes]),
        )

    def _encode(self, instruction: Instruction, scene: Scene) -> tuple[list[int], int]:
        tokens, answers = self._architecture.tokens, self._architecture.answers
        question = self._tokenizer.encode(f"{instruction.text}{tokens.answer}").ids
        reply = self._tokenizer.encode(f"{answers.answer(instruction.target, scene)}{tokens.end}").ids
        if len(reply) != ANSWER_TOKENS:
            raise ValueError(f"an answer has {len(reply)} tokens instead of {ANSWER_TOKENS}")
        pad = int(self._tokenizer.token_to_id(tokens.pad) or 0)
        ids = [*question, *reply]
        return ids + [pad] * (QUESTION_TOKENS - len(ids)), len(question)


def to_patches(images: Sequence[Image.Image], form: ImageForm) -> Floats:
    """Convert images of one size to normalised patches as the processor does, with axes scene, patch, value.

    The patches of an image token are next to each other.
    """
    if form.size:
        images = [image.resize(form.size, Image.Resampling.BILINEAR) for image in images]
    pixels = np.stack([np.asarray(image) for image in images])
    n, height, width, _ = pixels.shape
    mean, spread = np.array(form.mean, dtype=np.float32), np.array(form.std, dtype=np.float32)
    scaled: Any = (pixels.astype(np.float32) / np.float32(255) - mean) / spread
    rows, columns, side = height // PATCH // MERGE, width // PATCH // MERGE, PATCH
    parts: Floats = scaled.reshape(n, rows, MERGE, side, columns, MERGE, side, 3)
    return parts.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, rows * columns * MERGE**2, side * side * 3)


def patch_centres(grid: Grid) -> Floats:
    """Return the centres of the patches in pixels, with axes patch, (x, y), in the order of `to_patches`."""
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    return np.array(
        [
            ((c * MERGE + j + 0.5) * PATCH, (r * MERGE + i + 0.5) * PATCH)
            for r in range(rows)
            for c in range(columns)
            for i in range(MERGE)
            for j in range(MERGE)
        ],
        np.float32,
    )


def _patch_labels(scene: Scene, scale: NDArray[np.float64]) -> Floats:
    """Return the labels of the patches of an image that is resized by these factors of width and height."""
    grid = (round(scene.height * scale[1]) // PATCH, round(scene.width * scale[0]) // PATCH)
    labels = np.array([_label(scene, *(centre / scale)) for centre in patch_centres(grid)], np.float32)
    labels[:, 3:] *= scale.astype(np.float32)
    return labels


def _label(scene: Scene, x: float, y: float) -> Sequence[float]:
    for element in scene.elements:
        if element.contains(x, y):
            return (_NAMES.index(element.name), _COLOURS.index(element.colour), int(element.filled), *element.centre)
    return NO_ELEMENT


NAMES = len(_NAMES)
COLOUR_COUNT = len(_COLOURS)
