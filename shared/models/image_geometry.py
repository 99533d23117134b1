"""The size to which models of the Qwen-VL family resize images.

These models return coordinates in pixels of the resized image. The size is needed to convert them to the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MAX_ASPECT_RATIO: Final = 200
"""Maximum ratio of an image's longer side to its shorter side."""


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
        if min(width, height) < 1 or max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
            raise ValueError(
                f"one side of an image of {width} x {height} pixels is over {MAX_ASPECT_RATIO} times the other"
            )
        pixels = self._nearest(width) * self._nearest(height)
        if pixels > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            return self._shrunk(width, shrink), self._shrunk(height, shrink)
        if pixels < self.min_pixels:
            growth = math.sqrt(self.min_pixels / (width * height))
            return self._grown(width, growth), self._grown(height, growth)
        return self._nearest(width), self._nearest(height)

    def _nearest(self, side: int) -> int:
        return round(side / self.factor) * self.factor

    def _shrunk(self, side: int, shrink: float) -> int:
        # Dividing by the product would round differently, and sometimes change the result by a whole factor.
        return max(self.factor, math.floor(side / shrink / self.factor) * self.factor)

    def _grown(self, side: int, growth: float) -> int:
        return math.ceil(side * growth / self.factor) * self.factor
