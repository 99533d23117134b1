"""How many tokens an image takes that becomes one grid of patches; see `shared.models.image_tokens`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.models.image_geometry import MAX_ASPECT_RATIO


@dataclass(frozen=True, slots=True)
class PatchRows:
    """Rows of patches, each with a token at its end: Pixtral, Mistral 3.

    Attributes:
        max_width, max_height: a larger image is reduced to fit.
        patch: side of a patch, or of the square of merged patches, in pixels.
    """

    max_width: int
    max_height: int
    patch: int

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        ratio = max(height / self.max_height, width / self.max_width)
        if ratio > 1:
            width, height = math.floor(width / ratio), math.floor(height / ratio)
        columns, rows = -(-width // self.patch), -(-height // self.patch)
        return rows * (columns + 1) if columns else 0


@dataclass(frozen=True, slots=True)
class CroppedGrid:
    """Patches of the image in its own size, cropped or padded to whole tokens: Kimi-VL.

    Attributes:
        patch: side of a patch in pixels.
        merge_width, merge_height: patches that become one token.
        max_patches: a larger image is reduced to about this many.
        pad: whether the image is padded instead of cropped.
        max_side: a grid with this many patches in a row or column is refused.
    """

    patch: int
    merge_width: int
    merge_height: int
    max_patches: int
    pad: bool
    max_side: int = 512

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        patches = (width // self.patch) * (height // self.patch)
        if patches > self.max_patches:
            scale = math.sqrt(self.max_patches / patches)
            width, height = int(width * scale), int(height * scale)
        columns, rows = self._count(width, self.merge_width), self._count(height, self.merge_height)
        if max(columns * self.merge_width, rows * self.merge_height) >= self.max_side:
            raise ValueError("the image has too many patches in a row or column")
        return columns * rows

    def _count(self, pixels: int, merge: int) -> int:
        side = self.patch * merge
        return -(-pixels // side) if self.pad else pixels // side


@dataclass(frozen=True, slots=True)
class PooledGrid:
    """As many squares as fit into a number of tokens, in the image's shape: Gemma 4.

    Attributes:
        patch: side of a patch in pixels.
        pool: patches per side that become one token.
        max_tokens: maximum tokens, without the two around the image.
    """

    patch: int
    pool: int
    max_tokens: int

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        side = self.patch * self.pool
        factor = math.sqrt(self.max_tokens * self.pool**2 * self.patch**2 / (height * width))
        rows, columns = math.floor(factor * height / side), math.floor(factor * width / side)
        if not rows and not columns:
            return 0
        longer_by = max(width // height, height // width)
        return (rows * columns or min(longer_by, self.max_tokens)) + 2


@dataclass(frozen=True, slots=True)
class ResizedGrid:
    """A grid of squares between a minimum and a maximum of pixels: GLM-4V, GLM-OCR, PaddleOCR-VL.

    The rule of the Qwen family is `ImageGeometry`; this one enlarges short sides first.

    Attributes:
        side: side of the square of a token in pixels.
        min_pixels, max_pixels: limits for all frames together.
        frames: number of frames that an image counts as.
        at_once: whether both sides grow by the larger factor, rounded down. Otherwise they grow one after the other,
            and a side of a reduced image may become 0.
    """

    side: int
    min_pixels: int
    max_pixels: int
    frames: int = 1
    at_once: bool = True

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        width, height = self._enlarged(width, height)
        if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
            raise ValueError("one side is too long")
        limits = self.min_pixels, self.max_pixels
        return squares(width, height, self.side, limits, least=int(self.at_once), frames=self.frames)

    def _enlarged(self, width: int, height: int) -> tuple[int, int]:
        if min(width, height) >= self.side:
            return width, height
        if self.at_once:
            scale = max(self.side / height, self.side / width)
            return int(width * scale), int(height * scale)
        if height < self.side:
            width, height = round(width * self.side / height), self.side
        if width < self.side:
            width, height = self.side, round(height * self.side / width)
        return width, height


@dataclass(frozen=True, slots=True)
class PatchBudget:
    """As many patches as the image has, within limits: Nemotron Nano Omni.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches per side that become one token.
        min_patches, max_patches: limits.
    """

    patch: int
    merge: int
    min_patches: int
    max_patches: int

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        rows, columns = round(height / self.patch + 0.5), round(width / self.patch + 0.5)
        factor = min(math.sqrt(self.max_patches / (rows * columns)), 1.0)
        rows, columns = math.floor(factor * rows), math.floor(factor * columns)
        if self.max_patches > self.min_patches and rows * columns < self.min_patches:
            growth = math.sqrt(self.min_patches / (rows * columns))
            rows, columns = math.ceil(growth * rows), math.ceil(growth * columns)
        rows = self._whole(rows, columns)
        columns = self._whole(columns, rows)
        return rows * columns // self.merge**2 + 2

    def _whole(self, patches: int, others: int) -> int:
        """Return a multiple of `merge`: the next one, if it fits."""
        more = -(-patches // self.merge) * self.merge
        return more if more * others <= self.max_patches else max(self.merge, patches // self.merge * self.merge)


def squares(width: int, height: int, side: int, limits: tuple[float, float], *, least: int = 1, frames: int = 1) -> int:
    """Return the number of squares of an image whose sides become multiples of a square's side.

    Args:
        limits: minimum and maximum pixels of all frames.
        least: minimum squares per side of a reduced image.
    """
    columns, rows = max(1, round(width / side)), max(1, round(height / side))
    pixels, (min_pixels, max_pixels) = frames * columns * rows * side**2, limits
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        return max(least, math.floor(width / shrink / side)) * max(least, math.floor(height / shrink / side))
    if pixels < min_pixels:
        growth = math.sqrt(min_pixels / (frames * height * width))
        return math.ceil(width * growth / side) * math.ceil(height * growth / side)
    return columns * rows
