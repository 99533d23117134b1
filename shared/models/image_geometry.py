"""The size to which a model of the Qwen-VL family brings an image before it looks at it.

Such a model says places in pixels of that size: to find them in the image that was sent, one has to know it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MOST_ASPECT: Final = 200
"""Images that are more times as long as wide are refused, by the API and by models."""


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """What a model asks of an image's size.

    Attributes:
        factor: both sides become multiples of it: a patch's side times the patches that are merged along it.
        min_pixels: a smaller image is magnified, 1 or more.
        max_pixels: a larger one is made smaller, but no side less than `factor`.
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image as the model sees it: about its shape, number for number what mlx-vlm makes.

        Raises:
            ValueError: it is too long for its width, or has no pixels.
        """
        if min(width, height) < 1 or max(width, height) / min(width, height) > MOST_ASPECT:
            raise ValueError(f"an image of {width} x {height} pixels has one side over {MOST_ASPECT} times the other")
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
        # Two divisions: one by the product would round differently, and be off by a whole factor at times.
        return max(self.factor, math.floor(side / shrink / self.factor) * self.factor)

    def _grown(self, side: int, growth: float) -> int:
        return math.ceil(side * growth / self.factor) * self.factor
