"""The images of a prompt: where their tokens are, and which positions the model gives them.

Each token of an image has an id that depends on its content (a hash of the image's digest and of the place in it), so
whatever compares prompts by their tokens, as the prefix cache does, compares images as well.
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

Image.MAX_IMAGE_PIXELS = None  # the API has bounded it before it accepted the job

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


@dataclass(frozen=True, slots=True)
class Grid:
    """How an image is cut.

    Attributes:
        high, wide: patches; multiples of `merge`.
        merge: patches per side that become one token.
    """

    high: int
    wide: int
    merge: int

    @property
    def patches(self) -> int:
        """What the encoder computes."""
        return self.high * self.wide

    @property
    def tokens(self) -> int:
        """What the language model reads."""
        return self.patches // self.merge**2


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image of a prompt.

    Attributes:
        digest: of its file.
        start: place of its first token in the prompt.
    """

    digest: str
    grid: Grid
    start: int
    data: bytes = field(repr=False)

    @property
    def stop(self) -> int:
        """Place of the first token behind it."""
        return self.start + self.grid.tokens


@dataclass(slots=True)
class ImageMedia:
    """The images of one prompt; see `worker.runner.base.Media`.

    Attributes:
        positions: [3, tokens] of the prompt's tokens: time, height and width, as M-RoPE has them.
        shift: by how much the position of a token behind the prompt differs from its place.
        features: what the encoder made of the images, by digest, while the prompt is being read.
    """

    images: tuple[PlacedImage, ...]
    positions: Ints
    shift: int
    features: dict[str, mx.array] = field(default_factory=dict)

    def at(self, start: int, length: int) -> Ints:
        """[3, length] positions of tokens from a place on, also behind the prompt."""
        known = self.positions[:, start : start + length]
        first = max(start, self.positions.shape[1]) + self.shift
        behind = np.arange(first, first + length - known.shape[1], dtype=np.int32)
        return np.concatenate([known, np.broadcast_to(behind, (3, behind.size))], axis=1)

    def release(self) -> None:
        """See `worker.runner.base.Media`."""
        self.features.clear()

    def unread(self, done: int) -> list[PlacedImage]:
        """Images of which some token is not among the first `done`."""
        return [image for image in self.images if image.stop > done]


def place(
    tokens: Sequence[int], image_token: int, images: Sequence[tuple[str, Grid, bytes]]
) -> tuple[list[int], ImageMedia]:
    """Replace the placeholder token of each image by the image's tokens.

    Args:
        tokens: with one `image_token` for each image, in order.
        images: digest, grid and file of each.
    """
    expanded: list[int] = []
    placed: list[PlacedImage] = []
    positions: list[Ints] = []
    next_position = 0
    waiting = iter(images)
    for token in tokens:
        if token == image_token:
            digest, grid, data = next(waiting)
            placed.append(PlacedImage(digest, grid, len(expanded), data))
            expanded += _ids(digest, grid.tokens)
            positions.append(next_position + _inside(grid))
            next_position += max(grid.high, grid.wide) // grid.merge
        else:
            expanded.append(token)
            positions.append(np.full((3, 1), next_position, dtype=np.int32))
            next_position += 1
    return expanded, ImageMedia(tuple(placed), np.concatenate(positions, axis=1), next_position - len(expanded))


def opened(data: bytes) -> Image.Image:
    """The image in a file, upright and in RGB; of several frames the first. As `mlx_vlm.utils.load_image` does it."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow, and so mlx-vlm, clips it to 8 bits: all but the darkest 1/256 would become white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _inside(grid: Grid) -> Ints:
    """[3, tokens] positions within an image: all at the same time."""
    high, wide = grid.high // grid.merge, grid.wide // grid.merge
    rows, columns = np.divmod(np.arange(high * wide, dtype=np.int32), wide)
    return np.stack([np.zeros_like(rows), rows, columns])


def _ids(digest: str, tokens: int) -> list[int]:
    """Ids of an image's pieces: the upper half of 32 bits."""
    stream = hashlib.shake_128(digest.encode()).digest(4 * tokens)
    return [int(each) | IMAGE_TOKENS for each in np.frombuffer(stream, dtype="<u4")]
