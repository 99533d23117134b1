"""To which size a vision model brings an image before it looks: its coordinates and tokens are of that size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_NARROWEST: Final = 200
"""Models of the Qwen-VL family take no image that is longer than so many times its width."""


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """The resizing of the Qwen-VL family.

    Attributes:
        factor: both sides become multiples of it.
        min_pixels, max_pixels: between which the area is brought, with the shape kept as far as that goes.
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The width and height that the model sees.

        Raises:
            ValueError: it is too narrow.
        """
        if max(width, height) > _NARROWEST * min(width, height):
            raise ValueError(f"one side is more than {_NARROWEST} times the other")
        near = [round(side / self.factor) * self.factor for side in (width, height)]
        area = width * height
        if math.prod(near) > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            near = [max(self.factor, math.floor(side / shrink / self.factor) * self.factor) for side in (width, height)]
        elif math.prod(near) < self.min_pixels:
            grow = math.sqrt(self.min_pixels / area)
            near = [math.ceil(side * grow / self.factor) * self.factor for side in (width, height)]
        return near[0], near[1]
