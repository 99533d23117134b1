"""Synthetic screenshots: a page of coloured, labelled buttons, icons and fields, and what one may be told to click.

The same seed always gives the same scene. Nothing of the machine goes in: the font is the one that Pillow brings.
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
"""Width and height, multiples of 28 as the processor wants them: it then leaves the picture as it is."""
FONT_SIZE = 12
TOP, SIDE = 12, 8
"""Height of the bar at the top of a page, and width of the one at its left."""
_GAP = 3
_STEP = 2
_TRIES = 30


@dataclass(frozen=True, slots=True)
class Element:
    """Something on the page that can be clicked."""

    kind: Kind
    name: str
    """What is written on it; of an icon, what it shows."""
    colour: str
    """Empty for a field."""
    filled: bool
    """Whether a field has something in it."""
    box: Box
    """Left, top, right, bottom; the last two are outside."""

    def contains(self, x: float, y: float) -> bool:
        """Whether a click there hits it."""
        left, top, right, bottom = self.box
        return left <= x < right and top <= y < bottom

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle."""
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
    """The font of every label."""
    loaded = ImageFont.load_default(FONT_SIZE)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise TypeError("this Pillow has no FreeType: its font would look another way")
    return loaded


def make_scene(seed: int, size: tuple[int, int] | None = None) -> Scene:
    """The scene of this seed; of one of SIZES unless `size` says."""
    rng = random.Random(seed)
    width, height = size or rng.choice(SIZES)
    elements: list[Element] = []
    for _ in range(rng.randint(3, 7)):
        _add(elements, rng, width, height)
    return Scene(width, height, rng.choice(BACKGROUNDS), tuple(elements))


def _add(elements: list[Element], rng: random.Random, width: int, height: int) -> None:
    """Put one more element where there is room, if there is some."""
    kind, name, colour, filled = _look(elements, rng)
    if any(_alike(each, name, colour, filled) for each in elements):
        return  # nothing could tell the two apart
    wide, high = _measure(kind, name, rng)
    for _ in range(_TRIES):
        left = rng.randrange(SIDE + _GAP, width - wide - _GAP + 1, _STEP)
        top = rng.randrange(TOP + _GAP, height - high - _GAP + 1, _STEP)
        box = (left, top, left + wide, top + high)
        if not any(_too_near(box, element.box) for element in elements):
            elements.append(Element(kind, name, colour, filled, box))
            return


def _alike(element: Element, name: str, colour: str, filled: bool) -> bool:
    """Whether an element has all that tells a new one from others; names of different kinds differ."""
    return (element.name, element.colour, element.filled) == (name, colour, filled)


def _look(elements: list[Element], rng: random.Random) -> tuple[Kind, str, str, bool]:
    """Kind, name, colour and filling of a new element; often nearly those of one that is there already."""
    if elements and rng.random() < 0.5:
        like = rng.choice(elements)
        if like.kind == "field":
            return "field", like.name, "", not like.filled
        if rng.random() < 0.5:
            return like.kind, like.name, rng.choice(list(COLOURS)), False
        return like.kind, rng.choice(BUTTONS if like.kind == "button" else ICONS), like.colour, False
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
