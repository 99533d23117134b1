"""Synthetic screenshots: pages with coloured, labelled buttons, icons and fields.

The same seed gives the same scene on every machine: the font is Pillow's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import ImageFont

Kind = Literal["button", "icon", "field"]
Box = tuple[int, int, int, int]

COLOURS = {
    "red": (205, 40, 40),
    "green": (30, 140, 60),
    "blue": (40, 80, 210),
    "orange": (225, 125, 20),
    "purple": (130, 50, 160),
    "gray": (110, 115, 120),
}
BUTTONS = ("Save", "Open", "Cancel", "Delete", "Help", "Send", "OK", "Print")
ICONS = ("search", "home", "close", "menu", "star", "plus")
FIELDS = ("Name", "Email", "City", "Phone")
BACKGROUNDS = ((255, 255, 255), (240, 242, 245), (250, 245, 235), (232, 240, 250))

SIZES = ((140, 112), (168, 112), (168, 140))
"""Width and height, multiples of 28, so that the processor does not resize the image."""
FONT_SIZE = 12
TOP, SIDE = 12, 8
"""Height of the bar at the top and width of the bar at the left."""
_GAP = 3
_STEP = 2
_TRIES = 30


@dataclass(frozen=True, slots=True)
class Element:
    """An element of the page that can be clicked."""

    kind: Kind
    name: str
    """Its label, or what an icon shows."""
    colour: str
    """Empty for a field."""
    filled: bool
    """Whether a field contains text."""
    box: Box
    """Left, top, right, bottom; the last two are exclusive."""

    def contains(self, x: float, y: float) -> bool:
        """Return whether a click at this position hits it."""
        left, top, right, bottom = self.box
        return left <= x < right and top <= y < bottom

    @property
    def centre(self) -> tuple[float, float]:
        """Its centre."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True, slots=True)
class Scene:
    """A page."""

    width: int
    height: int
    background: tuple[int, int, int]
    elements: tuple[Element, ...]


@cache
def font() -> ImageFont.FreeTypeFont:
    """Return the font of all labels."""
    loaded = ImageFont.load_default(FONT_SIZE)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise TypeError("this Pillow has no FreeType, so its font looks different")
    return loaded


def make_scene(seed: int, size: tuple[int, int] | None = None) -> Scene:
    """Generate the scene of a seed. Without `size`, one of SIZES is drawn."""
    rng = random.Random(seed)
    width, height = size or rng.choice(SIZES)
    elements: list[Element] = []
    for _ in range(rng.randint(3, 7)):
        _add(elements, rng, width, height)
    return Scene(width, height, rng.choice(BACKGROUNDS), tuple(elements))


def _add(elements: list[Element], rng: random.Random, width: int, height: int) -> None:
    """Add an element if there is space for it."""
    kind, name, colour, filled = _draw_attributes(elements, rng)
    if any(_is_duplicate(each, name, colour, filled) for each in elements):
        return  # no instruction could distinguish them
    element_width, element_height = _measure(kind, name, rng)
    for _ in range(_TRIES):
        left = rng.randrange(SIDE + _GAP, width - element_width - _GAP + 1, _STEP)
        top = rng.randrange(TOP + _GAP, height - element_height - _GAP + 1, _STEP)
        box = (left, top, left + element_width, top + element_height)
        if not any(_too_near(box, element.box) for element in elements):
            elements.append(Element(kind, name, colour, filled, box))
            return


def _is_duplicate(element: Element, name: str, colour: str, filled: bool) -> bool:
    """Whether an element has the same attributes; names of different kinds differ anyway."""
    return (element.name, element.colour, element.filled) == (name, colour, filled)


def _draw_attributes(elements: list[Element], rng: random.Random) -> tuple[Kind, str, str, bool]:
    """Draw kind, name, colour and filling of an element, often similar to an existing one."""
    if elements and rng.random() < 0.5:
        similar = rng.choice(elements)
        if similar.kind == "field":
            return "field", similar.name, "", not similar.filled
        if rng.random() < 0.5:
            return similar.kind, similar.name, rng.choice(list(COLOURS)), False
        return similar.kind, rng.choice(BUTTONS if similar.kind == "button" else ICONS), similar.colour, False
    drawn = rng.random()
    if drawn < 0.5:
        return "button", rng.choice(BUTTONS), rng.choice(list(COLOURS)), False
    if drawn < 0.8:
        return "icon", rng.choice(ICONS), rng.choice(list(COLOURS)), False
    return "field", rng.choice(FIELDS), "", rng.random() < 0.5


def _measure(kind: Kind, name: str, rng: random.Random) -> tuple[int, int]:
    if kind == "icon":
        side = rng.choice((20, 22, 24))
        return side, side
    written = round(font().getlength(name))
    if kind == "button":
        return written + rng.randint(8, 18), rng.choice((18, 20, 22))
    return written + rng.randint(26, 36), rng.choice((18, 20, 22))


def _too_near(one: Box, other: Box) -> bool:
    return not (
        one[2] + _GAP <= other[0] or other[2] + _GAP <= one[0] or one[3] + _GAP <= other[1] or other[3] + _GAP <= one[1]
    )
