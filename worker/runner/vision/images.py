"""The images of a prompt: their tokens, and the positions that the model assigns to these.

The id of an image token is a hash of the image's digest and the token's index in the image. So code that compares
prompts by their tokens, such as the prefix cache, compares images as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from shared.image_files import open_image
from worker.runner.base import IMAGE_TOKENS

_DECODING: Final = 2
"""Version of `decode_image`. It is part of the ids of image tokens, because prefixes on disk must not be reused for an
image that is now decoded to other pixels. Increase it whenever the pixels change."""

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


class Layout(Protocol):
    """How an encoder sees an image of a certain size. Equal sizes have equal layouts.

    Attributes:
        tokens: number of tokens of the image in the language model.
        patches: size of the encoder's input, the unit of its cost.
        grid: the grid of patches, if every token of the image belongs to one.
    """

    @property
    def tokens(self) -> int: ...  # noqa: D102

    @property
    def patches(self) -> int: ...  # noqa: D102

    @property
    def grid(self) -> Grid | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout of an image that is divided into a grid of patches.

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

    @property
    def grid(self) -> Grid:
        """See `Layout.grid`."""
        return self


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image of a prompt.

    Attributes:
        digest: digest of the file.
        layout: how the encoder sees it.
        data: content of the file.
        pixels: number of pixels of the image that the API checked.
        start: index of its first token in the prompt.
    """

    digest: str
    layout: Layout
    data: bytes = field(repr=False)
    pixels: int
    start: int = 0

    @property
    def stop(self) -> int:
        """Index of the first token after it."""
        return self.start + self.layout.tokens


@dataclass(slots=True)
class ImageMedia:
    """The images of one prompt; see `worker.runner.base.Media`.

    Attributes:
        images: the images, in the order of their tokens.
        positions: [3, tokens] positions of the prompt's tokens for M-RoPE: time, row and column; None: the model counts
            image tokens like text.
        shift: see `Media.shift`.
        whole: whether the tokens of an image attend to each other, so that a pass may not end within an image.
        features: image features by digest, during the prefill; see `Encoder.stages`.
    """

    images: tuple[PlacedImage, ...]
    positions: Ints | None = None
    shift: int = 0
    whole: bool = False
    features: dict[str, mx.array] = field(default_factory=dict)

    def at(self, start: int, length: int) -> Ints:
        """Return the positions [3, length] of the tokens from index `start` on, in the prompt and after it."""
        assert self.positions is not None  # noqa: S101 - only M-RoPE asks for positions
        in_prompt = self.positions[:, start : start + length]
        first = max(start, self.positions.shape[1]) + self.shift
        after = np.arange(first, first + length - in_prompt.shape[1], dtype=np.int32)
        return np.concatenate([in_prompt, np.broadcast_to(after, (3, after.size))], axis=1)

    def pass_end(self, stop: int) -> int:
        """See `Media.pass_end`."""
        if not self.whole:
            return stop
        return next((image.stop for image in self.images if image.start < stop < image.stop), stop)

    def release(self) -> None:
        """See `Media.release`."""
        self.features.clear()

    def not_prefilled(self, tokens: int) -> list[PlacedImage]:
        """Return the images with at least one token after the first `tokens` tokens of the prompt."""
        return [image for image in self.images if image.stop > tokens]


def expand(tokens: Sequence[int], image_token: int, images: Sequence[PlacedImage]) -> tuple[list[int], ImageMedia]:
    """Replace the placeholder token of each image with the image's tokens.

    Args:
        tokens: token ids, with one `image_token` for each image, in order.
        images: the images, without `start`.

    Returns:
        The token ids and the media of the prompt.
    """
    expanded: list[int] = []
    placed: list[PlacedImage] = []
    remaining = iter(images)
    for token in tokens:
        if token == image_token:
            image = next(remaining)
            placed.append(replace(image, start=len(expanded)))
            expanded += _token_ids(image.digest, image.layout.tokens)
        else:
            expanded.append(token)
    return expanded, ImageMedia(tuple(placed))


def with_grid_positions(media: ImageMedia, tokens: int) -> ImageMedia:
    """Return the media of a prompt with M-RoPE positions. The layouts of its images have grids.

    Args:
        tokens: number of tokens of the prompt.
    """
    positions: list[Ints] = []
    next_position = end = 0
    for image in media.images:
        grid = image.layout.grid
        assert grid is not None  # noqa: S101 - the encoders of these families make no other layouts
        next_position = _append_text(positions, next_position, image.start - end)
        positions.append(next_position + _grid_positions(grid))
        next_position += max(grid.rows, grid.columns) // grid.merge
        end = image.stop
    next_position = _append_text(positions, next_position, tokens - end)
    return replace(media, positions=np.concatenate(positions, axis=1), shift=next_position - tokens)


def _append_text(positions: list[Ints], start: int, tokens: int) -> int:
    """Append the positions of text tokens. Returns the next position."""
    text = np.arange(start, start + tokens, dtype=np.int32)
    positions.append(np.broadcast_to(text, (3, tokens)))
    return start + tokens


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
