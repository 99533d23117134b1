"""Draws a scene with Pillow."""

from __future__ import annotations

from PIL import Image, ImageDraw

from scripts.ui_micro.scenes import COLOURS, SIDE, TOP, Box, Element, Scene, font

_INK = (30, 30, 35)
_PAPER = (255, 255, 255)
_FRAME = (150, 155, 165)


def draw(scene: Scene) -> Image.Image:
    """Return the screenshot of a scene."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, scene.width - 1, TOP - 1), fill=(60, 65, 75))
    pen.rectangle((0, TOP, SIDE - 1, scene.height - 1), fill=(95, 105, 125))
    for i in range(3):
        pen.ellipse((4 + 8 * i, 4, 8 + 8 * i, 8), fill=(200, 200, 205))
    for element in scene.elements:
        _DRAWERS[element.kind](pen, element)
    return image


def _button(pen: ImageDraw.ImageDraw, element: Element) -> None:
    left, top, right, bottom = element.box
    pen.rounded_rectangle((left, top, right - 1, bottom - 1), radius=3, fill=COLOURS[element.colour])
    pen.text(((left + right) / 2, (top + bottom) / 2), element.name, fill=_PAPER, font=font(), anchor="mm")


def _field(pen: ImageDraw.ImageDraw, element: Element) -> None:
    left, top, right, bottom = element.box
    pen.rectangle((left, top, right - 1, bottom - 1), fill=_PAPER, outline=_FRAME)
    middle = (top + bottom) / 2
    pen.text((left + 4, middle), element.name, fill=_INK, font=font(), anchor="lm")
    if element.filled:
        pen.rectangle((right - 19, middle - 3, right - 5, middle + 2), fill=_INK)


def _icon(pen: ImageDraw.ImageDraw, element: Element) -> None:
    left, top, right, bottom = element.box
    pen.ellipse((left, top, right - 1, bottom - 1), fill=COLOURS[element.colour])
    inset = (right - left - 12) // 2
    _ICONS[element.name](pen, (left + inset, top + inset, left + inset + 11, top + inset + 11))


def _search(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    pen.ellipse((left, top, right - 4, bottom - 4), outline=_PAPER, width=2)
    pen.line((right - 4, bottom - 4, right, bottom), fill=_PAPER, width=2)


def _home(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    pen.polygon(((left, top + 6), ((left + right) / 2, top), (right, top + 6)), fill=_PAPER)
    pen.rectangle((left + 2, top + 6, right - 2, bottom), fill=_PAPER)


def _close(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    pen.line((left + 1, top + 1, right - 1, bottom - 1), fill=_PAPER, width=3)
    pen.line((left + 1, bottom - 1, right - 1, top + 1), fill=_PAPER, width=3)


def _menu(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, _ = box
    for y in (top + 1, top + 5, top + 9):
        pen.rectangle((left, y, right, y + 1), fill=_PAPER)


def _star(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    pen.polygon(
        ((x, top), (x + 2, y - 2), (right, y), (x + 2, y + 2), (x, bottom), (x - 2, y + 2), (left, y), (x - 2, y - 2)),
        fill=_PAPER,
    )


def _plus(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    pen.rectangle((left + 4, top, right - 4, bottom), fill=_PAPER)
    pen.rectangle((left, top + 4, right, bottom - 4), fill=_PAPER)


_DRAWERS = {"button": _button, "icon": _icon, "field": _field}
_ICONS = {"search": _search, "home": _home, "close": _close, "menu": _menu, "star": _star, "plus": _plus}
