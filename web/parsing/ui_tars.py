r"""Parse the output of a UI-TARS model into actions, with coordinates in pixels of the image in the request.

    Thought: The search field is empty.
    Action: click(start_box='(197,525)')

    type(content='weather\n')

UI-TARS 1.5 gives coordinates in pixels of the resized image that it sees; they are converted here. If any part of the
output is invalid, there are no actions at all: carrying out only some of them could do harm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.models.image_geometry import ImageGeometry
from web.parsing.ui_tars_calls import ActionName, Call, ParseError, parse_calls, shortened


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
class Action:
    """An action. Fields that do not apply to it are None.

    Attributes:
        thought: what the model wrote before the action; it also applies to the actions that follow directly.
        start: where to act, or where a drag starts. A scroll without it applies at the pointer.
        end: where a drag or a swipe ends, or a scroll without a direction.
        key: keys to press together, in the model's notation: "ctrl c".
        text: the text to type, or the closing message. A line break at the end means Enter.
        direction: of a scroll: up, down, left or right. None if the scroll has an `end`.
        app: name of the app to open.
        time: duration of a long press, as the model wrote it; None if it wrote none. The model defines no unit.
        raw: the call as the model wrote it.
    """

    action: ActionName
    thought: str | None
    start: Point | None
    end: Point | None
    key: str | None
    text: str | None
    direction: str | None
    app: str | None
    time: str | None
    raw: str


def parse(text: str, size: tuple[int, int] | None, geometry: ImageGeometry | None) -> tuple[list[Action], str | None]:
    """Return the actions in a text, or an empty list and the reason in one line.

    Args:
        size: width and height of the last image of the request.
        geometry: how the model resizes images; without it, the model is assumed to see images in their own size.
    """
    try:
        scale = _Scale.of(size, geometry)
        return [_action(call, scale) for call in parse_calls(text)], None
    except ParseError as error:
        return [], str(error)


_DIRECTIONS: Final = frozenset({"up", "down", "left", "right"})
_REQUIRED: Final[Mapping[ActionName, tuple[str, ...]]] = {
    ActionName.CLICK: ("start_box",),
    ActionName.LEFT_DOUBLE: ("start_box",),
    ActionName.RIGHT_SINGLE: ("start_box",),
    ActionName.DRAG: ("start_box", "end_box"),
    ActionName.HOTKEY: ("key",),
    ActionName.TYPE: ("content",),
    ActionName.SCROLL: ("direction",),
    ActionName.WAIT: (),
    ActionName.FINISHED: (),
    ActionName.CALL_USER: (),
    ActionName.LONG_PRESS: ("start_box",),
    ActionName.SWIPE: ("start_box", "end_box"),
    ActionName.OPEN_APP: ("app_name",),
    ActionName.PRESS_HOME: (),
    ActionName.PRESS_BACK: (),
    ActionName.PRESS_ENTER: (),
}
_OPTIONAL: Final[Mapping[ActionName, tuple[str, ...]]] = {
    ActionName.SCROLL: ("start_box",),
    ActionName.FINISHED: ("content",),
    ActionName.LONG_PRESS: ("time",),
}
_SWIPE: Final = ("start_box", "end_box")
"""The arguments of a scroll on phones in the first version of UI-TARS, instead of a direction."""
_TAGS: Final = re.compile(r"<\|box_(?:start|end)\|>|</?(?:bbox|point)>")
_BRACKETS: Final = str.maketrans("()[],", "     ")
_NUMBER: Final = re.compile(r"-?[0-9]{1,7}(?:\.[0-9]{0,20})?")
_ESCAPE: Final = re.compile(r"\\(['\"n\\])")


@dataclass(frozen=True, slots=True)
class _Scale:
    """Converts coordinates from the image that the model sees to the image that was sent."""

    sent: tuple[int, int] | None
    seen: tuple[int, int] | None

    @classmethod
    def of(cls, size: tuple[int, int] | None, geometry: ImageGeometry | None) -> _Scale:
        try:
            return cls(size, geometry.resized(*size) if size and geometry else size)
        except ValueError as error:
            raise ParseError(f"The image has no valid coordinates: {error}.") from error

    def point(self, x: float, y: float) -> Point:
        if self.sent is None or self.seen is None:
            return Point(_rounded(x), _rounded(y), inside=False)
        (width, height), (seen_width, seen_height) = self.sent, self.seen
        x, y = _rounded(x * width / seen_width), _rounded(y * height / seen_height)
        return Point(x, y, inside=0 <= x < width and 0 <= y < height)


def _rounded(number: float) -> float:
    return round(number, 1) + 0.0  # adding 0 turns -0.0 into 0.0


def _action(call: Call, scale: _Scale) -> Action:
    is_swipe = call.name is ActionName.SCROLL and "end_box" in call.arguments and "direction" not in call.arguments
    required = _SWIPE if is_swipe else _REQUIRED[call.name]
    for argument in required:
        if argument not in call.arguments:
            raise ParseError(f"{call.name} needs the argument {argument}.")
    used = {name: call.arguments.get(name) for name in (*required, *_OPTIONAL.get(call.name, ()))}
    return Action(
        action=call.name,
        thought=call.thought,
        start=_point(call.name, "start_box", used.get("start_box"), scale),
        end=_point(call.name, "end_box", used.get("end_box"), scale),
        key=_filled(call.name, "key", used.get("key")),
        text=_unescaped(used.get("content")),
        direction=_direction(used.get("direction")),
        app=_filled(call.name, "app_name", _unescaped(used.get("app_name"))),
        time=(used.get("time") or "").strip() or None,
        raw=call.raw,
    )


def _point(name: ActionName, argument: str, value: str | None, scale: _Scale) -> Point | None:
    """Parse a point, or a box, of which the center is returned."""
    if value is None:
        return None
    numbers = _TAGS.sub(" ", value).translate(_BRACKETS).split()
    if len(numbers) not in {2, 4} or not all(map(_NUMBER.fullmatch, numbers)):
        raise ParseError(f"The {argument} of {name} is neither a point nor a box: {shortened(value)}.")
    corners = [float(number) for number in numbers]
    return scale.point((corners[0] + corners[-2]) / 2, (corners[1] + corners[-1]) / 2)


def _filled(name: ActionName, argument: str, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise ParseError(f"The {argument} of {name} is empty.")
    return value


def _unescaped(value: str | None) -> str | None:
    r"""Resolve the escapes that the model is prompted to use, and \\. Other backslashes stay: C:\temp has no tab."""
    return None if value is None else _ESCAPE.sub(lambda escape: escape[1].replace("n", "\n"), value)


def _direction(value: str | None) -> str | None:
    direction = None if value is None else value.strip().lower()
    if direction is not None and direction not in _DIRECTIONS:
        raise ParseError(f"Unknown direction of {ActionName.SCROLL}: {shortened(direction)}.")
    return direction
