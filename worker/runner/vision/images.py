"""The images of a prompt: their tokens, and the positions that the model assigns to these.

The id of an image token is a hash of the image's digest and the token's index in the image. So code that compares
prompts by their tokens, such as the prefix cache, compares images as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from shared.image_files import open_image
from worker.runner.base import IMAGE_TOKENS

_DECODING: Final = 2
"""Version of `decode_image`. It is part of the ids of image tokens, because prefixes on disk must not be reused for an
image that is now decoded to other pixels. Increase it whenever the pixels change."""

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
        data: content of the file.
        pixels: number of pixels of the image that the API checked.
        start: index of its first token in the prompt.
    """

    digest: str
    grid: Grid
    data: bytes = field(repr=False)
    pixels: int
    start: int = 0

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


def expand(tokens: Sequence[int], image_token: int, images: Sequence[PlacedImage]) -> tuple[list[int], ImageMedia]:
    """Replace the placeholder token of each image with the image's tokens; see `VisionFamily.expand`."""
    expanded: list[int] = []
    placed: list[PlacedImage] = []
    positions: list[Ints] = []
    next_position = 0
    remaining = iter(images)
    for token in tokens:
        if token == image_token:
            image = next(remaining)
            grid = image.grid
            placed.append(replace(image, start=len(expanded)))
            expanded += _token_ids(image.digest, grid.tokens)
            positions.append(next_position + _grid_positions(grid))
            next_position += max(grid.rows, grid.columns) // grid.merge
        else:
            expanded.append(token)
            positions.append(np.full((3, 1), next_position, dtype=np.int32))
            next_position += 1
    return expanded, ImageMedia(tuple(placed), np.concatenate(positions, axis=1), next_position - len(expanded))


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame of an image file, upright and in RGB.

    Transparent pixels show a white background, as in a browser. mlx-vlm drops the transparency instead, which turns
    black text on a transparent background all black.

    Raises:
        TooManyPixels: the image has more than `max_pixels`.
        Exception: the file is broken or has another format than the API accepts.
    """
    image = ImageOps.exif_transpose(open_image(data, max_pixels))
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    background = Image.new("RGB", image.size, "white")
    background.paste(image, mask=image.getchannel("A"))
    return background


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit greyscale to 8 bits. Pillow clips the values, which turns most of an image white."""
    values = np.asarray(image)
    scaled = (values >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


def _grid_positions(grid: Grid) -> Ints:
    """Return the positions [3, tokens] within an image: the time is 0 for all tokens."""
    height, width = grid.rows // grid.merge, grid.columns // grid.merge
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int32), width)
    return np.stack([np.zeros_like(rows), rows, columns])


def _token_ids(digest: str, tokens: int) -> list[int]:
    """Return the ids of an image's tokens, in the upper half of the 32-bit range."""
    stream = hashlib.shake_128(f"{_DECODING}:{digest}".encode()).digest(4 * tokens)
    return [int(each) | IMAGE_TOKENS for each in np.frombuffer(stream, dtype="<u4")]
