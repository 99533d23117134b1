"""How many tokens an image takes that becomes several tiles; see `shared.models.image_tokens`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from shared.models.image_grids import squares


@dataclass(frozen=True, slots=True)
class SquareTiles:
    """A grid of tiles that has about the shape of the image: InternVL.

    Attributes:
        side: side of a tile in pixels.
        min_tiles, max_tiles: limits of the number of tiles.
        thumbnail: whether a small copy of the whole image follows the tiles, if there are several.
        tile_tokens: tokens of a tile.
        around: tokens before and after all tiles.
    """

    side: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    tile_tokens: int
    around: int = 2

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        area, tile = width * height, self.side**2
        best, best_difference = 1, math.inf
        for ratio, tiles in _grids(self.min_tiles, self.max_tiles):
            difference = abs(width / height - ratio)
            nearer = abs(area - tile * tiles) < abs(area - tile * best)
            if difference < best_difference or (difference == best_difference and nearer):
                best, best_difference = tiles, difference
        return (best + (self.thumbnail and best > 1)) * self.tile_tokens + self.around


@dataclass(frozen=True, slots=True)
class LfmTiles:
    """A small image as it is, a large one as a grid of tiles: LFM2-VL.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches per side that become one token.
        min_tokens, max_tokens: limits for an image that is not split.
        tolerance: an image with this many times the pixels of `max_tokens` is split.
        split: whether large images are split.
        side, min_tiles, max_tiles, thumbnail: see `SquareTiles`.
    """

    patch: int
    merge: int
    min_tokens: int
    max_tokens: int
    tolerance: float
    split: bool
    side: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        around, marker = 2, 1
        whole = self._whole(width, height)
        tiles = self._tiles(width, height) if self.split and self._is_large(width, height) else 1
        if tiles == 1:
            return whole + around
        tile_tokens = math.ceil(self.side // self.patch / self.merge) ** 2
        return tiles * (tile_tokens + marker) + (whole + marker if self.thumbnail else 0) + around

    def _whole(self, width: int, height: int) -> int:
        side = self.patch * self.merge
        return squares(width, height, side, (self.min_tokens * side**2, self.max_tokens * side**2))

    def _is_large(self, width: int, height: int) -> bool:
        side = self.patch * self.merge
        pixels = max(self.patch, _nearest(width, side)) * max(self.patch, _nearest(height, side))
        return pixels > self.max_tokens * side**2 * self.tolerance

    def _tiles(self, width: int, height: int) -> int:
        return _nearest_grid(width, height, self.side, (self.min_tiles, self.max_tiles))[1]


@dataclass(frozen=True, slots=True)
class TileRows:
    """Rows of tiles, then the whole image as one more tile: Idefics 3, SmolVLM.

    Attributes:
        longest: the longer side is resized to this many pixels.
        side: side of a tile in pixels.
        split: whether images are split into tiles.
        tile_tokens: tokens of a tile in a row, with its markers.
        whole_tokens: tokens of the whole image, with its markers.
        row_end, last_row_end: tokens after a row, and after the last one.
    """

    longest: int
    side: int
    split: bool
    tile_tokens: int
    whole_tokens: int
    row_end: int
    last_row_end: int

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        columns, rows = self._grid(*self._resized(width, height)) if self.split else (1, 1)
        if rows * columns <= 1:
            return self.whole_tokens * rows * columns
        ends = (rows - 1) * self.row_end + self.last_row_end
        return rows * columns * self.tile_tokens + ends + self.whole_tokens

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        ratio, limit = width / height, 4096  # the limit is the same for all models
        if width >= height:
            width, height = self.longest, max(_even(int(self.longest / ratio)), 1)
        else:
            width, height = max(_even(int(self.longest * ratio)), 1), self.longest
        ratio = width / height
        if width >= height and width > limit:
            width, height = limit, int(limit / ratio)
        elif height > limit:
            width, height = int(limit * ratio), limit
        return max(width, 1), max(height, 1)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.side)
            return columns, math.ceil(int(columns * self.side / ratio) / self.side)
        rows = math.ceil(height / self.side)
        return math.ceil(int(rows * self.side * ratio) / self.side), rows


@dataclass(frozen=True, slots=True)
class PinpointTiles:
    """The whole image, then a grid of tiles without the padding, a token after each row: Granite 4 Vision, LLaVA-NeXT.

    Attributes:
        resolutions: pairs of height and width to which images are resized.
        side: side of a tile in pixels.
        tile: tokens per side of a tile.
        additional: tokens in addition, possibly negative.
    """

    resolutions: tuple[tuple[int, int], ...]
    side: int
    tile: int
    additional: int

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        best_height, best_width = self._best(width, height)
        rows, columns = self.tile * (best_height // self.side), self.tile * (best_width // self.side)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return rows * (columns + 1) + self.tile**2 + self.additional

    def _best(self, width: int, height: int) -> tuple[int, int]:
        """Return the resolution that keeps the most pixels, then the one that wastes the fewest."""

        def quality(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[1] / width, resolution[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - resolution[0] * resolution[1]

        return max(self.resolutions, key=quality)


@dataclass(frozen=True, slots=True)
class WholeAndCrops:
    """The whole image, and a large one also as a grid of crops before it: DeepSeek-OCR.

    Attributes:
        crop_side: side of a crop in pixels; smaller images are not cropped.
        max_crops: limit of the number of crops.
        crop, whole: tokens per side of a crop, and of the whole image.
        row_end: tokens after a row.
    """

    crop_side: int
    max_crops: int
    crop: int
    whole: int
    row_end: int

    def tokens(self, width: int, height: int) -> int:
        """See `ImageTokens.tokens`."""
        separator = 1
        found = self.whole * (self.whole + self.row_end) + separator
        if max(width, height) <= self.crop_side:
            return found
        ratio, crops = _nearest_grid(width, height, self.crop_side, (2, self.max_crops))
        rows = round(math.sqrt(crops / ratio)) * self.crop
        return found + rows * (crops * self.crop**2 // rows + self.row_end)


def _nearest_grid(width: int, height: int, side: int, limits: tuple[int, int]) -> tuple[float, int]:
    """Return the grid of tiles whose shape is nearest to an image's; of equal shapes the largest that it half fills."""
    best, best_difference = (1.0, 1), math.inf
    for ratio, tiles in _grids(*limits):
        difference = abs(width / height - ratio)
        if difference < best_difference or (difference == best_difference and width * height > 0.5 * side**2 * tiles):
            best, best_difference = (ratio, tiles), difference
    return best


@lru_cache(64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[float, int], ...]:
    """Return the possible grids, the smallest first: width divided by height, and number of tiles."""
    sides = range(1, max_tiles + 1)
    sizes = {(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles}
    return tuple((columns / rows, columns * rows) for columns, rows in sorted(sizes, key=math.prod))


def _nearest(pixels: int, side: int) -> int:
    return round(pixels / side) * side


def _even(number: int) -> int:
    return number + number % 2
