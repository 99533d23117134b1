"""What the coordinates in a model's answers refer to, and the size to which models of the Qwen-VL family resize images.

Some of these models return coordinates in pixels of the resized image, others in thousandths of its width and height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_ASPECT_RATIO: Final = 200
"""Maximum ratio of an image's longer side to its shorter side."""

_IN_THOUSANDTHS: Final = frozenset({"qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "gemma3"})
"""Model types, by config.json, that write coordinates in thousandths. UI-TARS 1.0 is a qwen2_vl, 1.5 a qwen2_5_vl.

Gemma 3 sees every image resized to the same square, so it does not know its size in pixels."""


class Coordinates(StrEnum):
    """What the coordinates in a model's answers refer to."""

    PIXELS = "pixels"
    """Pixels of the image after resizing."""
    THOUSANDTHS = "thousandths"
    """Thousandths of the image's width and height."""

    @classmethod
    def of(cls, model_type: str | None) -> Coordinates:
        """Return the coordinates of a type of model."""
        return cls.THOUSANDTHS if model_type in _IN_THOUSANDTHS else cls.PIXELS


def check_aspect_ratio(width: int, height: int) -> None:
    """Refuse an image that no model can use. Resizing its shorter side to a model's size could take any memory.

    Raises:
        ValueError: the image has no pixels, or its aspect ratio is too high.
    """
    if min(width, height) < 1 or max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"one side of an image of {width} x {height} pixels is over {MAX_ASPECT_RATIO} times the other"
        )


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """A model's rules for the size of images.

    Attributes:
        factor: both sides become multiples of it: side of a patch times number of merged patches per side.
        min_pixels: smaller images are enlarged to this size; at least 1.
        max_pixels: larger images are reduced to this size, but no side becomes less than `factor`.
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after resizing: exactly the values that mlx-vlm computes.

        Raises:
            ValueError: the image has no pixels, or its aspect ratio is too high.
        """
        check_aspect_ratio(width, height)
        pixels = self._nearest(width) * self._nearest(height)
        if pixels > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            return self._shrunk(width, shrink), self._shrunk(height, shrink)
        if pixels < self.min_pixels:
            growth = math.sqrt(self.min_pixels / (width * height))
            return self._grown(width, growth), self._grown(height, growth)
        return self._nearest(width), self._nearest(height)

    def tokens(self, width: int, height: int) -> int:
        """See `shared.models.image_tokens.ImageTokens`."""
        width, height = self.resized(width, height)
        return width * height // self.factor**2

    def _nearest(self, side: int) -> int:
        return round(side / self.factor) * self.factor

    def _shrunk(self, side: int, shrink: float) -> int:
        # Dividing by the product would round differently, and sometimes change the result by a whole factor.
        return max(self.factor, math.floor(side / shrink / self.factor) * self.factor)

    def _grown(self, side: int, growth: float) -> int:
        return math.ceil(side * growth / self.factor) * self.factor
