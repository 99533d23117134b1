"""The images of a prompt: their tokens, and the positions that the model assigns to these.

The id of an image token is a hash of the image's digest and the token's index in the image. So code that compares
prompts by their tokens, such as the prefix cache, compares images as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from worker.runner.base import IMAGE_TOKENS

Image.MAX_IMAGE_PIXELS = None  # the API limits the size before it accepts a job

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of patches that an image is divided into.

    Attributes:
        rows, columns: number of patches; multiples of `merge`.
        merge: each square of `merge` by `merge` patches becomes one token.
    """

    rows: int
    columns: int
    merge: int

    @property
    def patches(self) -> int:
        """Number of patches, the input of the encoder."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Number of tokens, the input of the language model."""
        return self.patches // self.merge**2


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image of a prompt.

    Attributes:
        digest: digest of the file.
        grid: the grid of patches.
        start: index of its first token in the prompt.
        data: content of the file.
    """

    digest: str
    grid: Grid
    start: int
    data: bytes = field(repr=False)

    @property
    def stop(self) -> int:
        """Index of the first token after it."""
        return self.start + self.grid.tokens


@dataclass(slots=True)
class ImageMedia:
    """The images of one prompt; see `worker.runner.base.Media`.

    Attributes:
        images: the images, in the order of their tokens.
        positions: [3, tokens] positions of the prompt's tokens for M-RoPE: time, row and column.
        shift: see `Media.shift`.
        features: image features by digest, during the prefill.
    """

    images: tuple[PlacedImage, ...]
    positions: Ints
    shift: int
    features: dict[str, mx.array] = field(default_factory=dict)

    def at(self, start: int, length: int) -> Ints:
        """Return the positions [3, length] of the tokens from index `start` on, in the prompt and after it."""
        in_prompt = self.positions[:, start : start + length]
        first = max(start, self.positions.shape[1]) + self.shift
        after = np.arange(first, first + length - in_prompt.shape[1], dtype=np.int32)
        return np.concatenate([in_prompt, np.broadcast_to(after, (3, after.size))], axis=1)

    def release(self) -> None:
        """See `Media.release`."""
        self.features.clear()

    def not_prefilled(self, tokens: int) -> list[PlacedImage]:
        """Return the images with at least one token after the first `tokens` tokens of the prompt."""
        return [image for image in self.images if image.stop > tokens]


def expand(
    tokens: Sequence[int], image_token: int, images: Sequence[tuple[str, Grid, bytes]]
) -> tuple[list[int], ImageMedia]:
    """Replace the placeholder token of each image with the image's tokens; see `VisionFamily.expand`."""
    expanded: list[int] = []
    placed: list[PlacedImage] = []
    positions: list[Ints] = []
    next_position = 0
    remaining = iter(images)
    for token in tokens:
        if token == image_token:
            digest, grid, data = next(remaining)
            placed.append(PlacedImage(digest, grid, len(expanded), data))
            expanded += _token_ids(digest, grid.tokens)
            positions.append(next_position + _grid_positions(grid))
            next_position += max(grid.rows, grid.columns) // grid.merge
        else:
            expanded.append(token)
            positions.append(np.full((3, 1), next_position, dtype=np.int32))
            next_position += 1
    return expanded, ImageMedia(tuple(placed), np.concatenate(positions, axis=1), next_position - len(expanded))


def decode_image(data: bytes) -> Image.Image:
    """Decode the first frame of an image file, upright and in RGB, like `mlx_vlm.utils.load_image`."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    if image.mode.startswith("I"):
        # 16-bit greyscale. Pillow, and thus mlx-vlm, clips values to 8 bits, which turns most of an image white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _grid_positions(grid: Grid) -> Ints:
    """Return the positions [3, tokens] within an image: the time is 0 for all tokens."""
    height, width = grid.rows // grid.merge, grid.columns // grid.merge
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int32), width)
    return np.stack([np.zeros_like(rows), rows, columns])


def _token_ids(digest: str, tokens: int) -> list[int]:
    """Return the ids of an image's tokens, in the upper half of the 32-bit range."""
    stream = hashlib.shake_128(digest.encode()).digest(4 * tokens)
    return [int(each) | IMAGE_TOKENS for each in np.frombuffer(stream, dtype="<u4")]
