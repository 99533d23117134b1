"""Convert the coordinates that a model writes to pixels of the image as it was sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from shared.models.image_geometry import Coordinates, ImageGeometry

_TAGS: Final = re.compile(r"<\|box_(?:start|end)\|>|</?(?:bbox|point)>")
_BRACKETS: Final = str.maketrans("()[],", "     ")
_NUMBER: Final = re.compile(r"-?[0-9]{1,7}(?:\.[0-9]{0,20})?")
_MAX: Final = 1e7
"""Limit for coordinates; larger numbers are nonsense, and could overflow."""
THOUSANDTHS: Final = (1000, 1000)
"""Size of the image for models that write coordinates in thousandths of its width and height."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point in the image as it was sent: pixels from the upper left, with one decimal.

    Attributes:
        inside: whether the point is inside the image. False if there is no image; the coordinates are then those that
            the model wrote.
    """

    x: float
    y: float
    inside: bool


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in the image as it was sent, in pixels.

    Attributes:
        x1, y1: upper left corner.
        x2, y2: lower right corner.
        inside: whether the whole box is inside the image.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    inside: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """Converts coordinates from the image that the model describes to the image that was sent.

    Attributes:
        sent: width and height of the image that was sent; None without an image.
        seen: width and height of the image to which the model's coordinates refer.
        requested: whether the request says what they refer to, in whatever form the answer is.
    """

    sent: tuple[int, int] | None
    seen: tuple[int, int] | None
    requested: bool = False

    @classmethod
    def of(cls, size: tuple[int, int] | None, geometry: ImageGeometry | None, coordinates: Coordinates) -> Scale:
        """Return the scale of a model.

        Args:
            size: width and height of the last image of the request.
            geometry: how the model resizes images; without it, the model is assumed to see images in their own size.

        Raises:
            ValueError: the model has no coordinates in an image of this size.
        """
        if coordinates is Coordinates.THOUSANDTHS:
            return cls(size, THOUSANDTHS)
        return cls(size, geometry.resized(*size) if size and geometry else size)

    def in_thousandths(self) -> Scale:
        """Return the scale for an answer in a form whose coordinates are thousandths, unless the request differs."""
        return self if self.requested else Scale(self.sent, THOUSANDTHS)

    def point(self, x: float, y: float) -> Point:
        """Convert a point."""
        x, y, inside = self._converted(x, y)
        return Point(x, y, inside and self.sent is not None and x < self.sent[0] and y < self.sent[1])

    def center(self, corners: list[float]) -> Point:
        """Convert a point, or the center of a box."""
        return self.point((corners[0] + corners[-2]) / 2, (corners[1] + corners[-1]) / 2)

    def box(self, x1: float, y1: float, x2: float, y2: float) -> Box:
        """Convert a box from any two opposite corners. Its lower right corner may be on the edge of the image."""
        left, upper, first_inside = self._converted(min(x1, x2), min(y1, y2))
        right, lower, second_inside = self._converted(max(x1, x2), max(y1, y2))
        return Box(left, upper, right, lower, first_inside and second_inside)

    def _converted(self, x: float, y: float) -> tuple[float, float, bool]:
        """Return a point's coordinates, and whether it is inside the image or on its edge."""
        if self.sent is None or self.seen is None:
            return _rounded(x), _rounded(y), False
        (width, height), (seen_width, seen_height) = self.sent, self.seen
        x, y = _rounded(x * width / seen_width), _rounded(y * height / seen_height)
        return x, y, 0 <= x <= width and 0 <= y <= height


def corners_of(value: Any) -> list[float] | None:
    """Return the two numbers of a point or the four of a box, from JSON or a text in any of the models' notations.

    Returns:
        None for any other value.
    """
    if isinstance(value, str):
        texts = _TAGS.sub(" ", value).translate(_BRACKETS).split()
        value = [float(text) if _NUMBER.fullmatch(text) else None for text in texts]
    if not isinstance(value, list) or len(value) not in {2, 4} or not all(map(is_number, value)):
        return None
    return [float(number) for number in value]


def is_number(value: Any) -> bool:
    """Whether a value is a number of a reasonable size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX


def _rounded(number: float) -> float:
    return round(number, 1) + 0.0  # adding 0 turns -0.0 into 0.0
