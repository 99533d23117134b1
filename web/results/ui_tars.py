r"""What a UI-TARS model wants done: its answer as actions, with places in pixels of the image that was asked about.

    Thought: The search field is empty.
    Action: click(start_box='(197,525)')

    type(content='weather\n')

UI-TARS 1.5 says places in pixels of the image as it sees it, which is not the size that was sent. An answer is read
as a whole or not at all: whoever acts on half of one does what the model did not mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.models.image_geometry import ImageGeometry
from web.results.ui_tars_calls import ActionName, Call, Unreadable, brief, calls


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the image as it was sent, in pixels to one decimal, from the upper left.

    Attributes:
        inside: it lies in the image. False too when there is no image: the numbers are then the model's own.
    """

    x: float
    y: float
    inside: bool


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do. What an action does not take is None.

    Attributes:
        thought: what the model said before it, for all actions that follow.
        start: where; of a drag, from where. A scroll without one is where the pointer is.
        end: where a drag ends.
        key: keys to press together, as the model names them: "ctrl c".
        text: what to type, or the last word. A line break at its end means Enter.
        direction: of a scroll: up, down, left or right.
        raw: the call as the model wrote it.
    """

    action: ActionName
    thought: str | None
    start: Point | None
    end: Point | None
    key: str | None
    text: str | None
    direction: str | None
    raw: str


def parse(text: str, size: tuple[int, int] | None, geometry: ImageGeometry | None) -> tuple[list[Action], str | None]:
    """The actions in an answer; or none, and in one line why.

    Args:
        size: width and height of the image that was asked about.
        geometry: how the model resizes images; without it places are taken to be in the image's own pixels.
    """
    try:
        picture = _Picture.of(size, geometry)
        return [_action(call, picture) for call in calls(text)], None
    except Unreadable as error:
        return [], str(error)


_DIRECTIONS: Final = frozenset({"up", "down", "left", "right"})
_NEEDS: Final[Mapping[ActionName, tuple[str, ...]]] = {
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
}
_MAY_HAVE: Final[Mapping[ActionName, tuple[str, ...]]] = {
    ActionName.SCROLL: ("start_box",),
    ActionName.FINISHED: ("content",),
}
_TAGS: Final = re.compile(r"<\|box_(?:start|end)\|>|</?(?:bbox|point)>")
_BRACKETS: Final = str.maketrans("()[],", "     ")
_NUMBER: Final = re.compile(r"-?[0-9]{1,7}(?:\.[0-9]{0,20})?")
_ESCAPE: Final = re.compile(r"\\(['\"n\\])")


@dataclass(frozen=True, slots=True)
class _Picture:
    """The image that was asked about, as it was sent and as the model saw it."""

    size: tuple[int, int] | None
    seen: tuple[int, int] | None

    @classmethod
    def of(cls, size: tuple[int, int] | None, geometry: ImageGeometry | None) -> _Picture:
        try:
            return cls(size, geometry.resized(*size) if size and geometry else size)
        except ValueError as error:
            raise Unreadable(f"There is no place in it: {error}.") from error

    def point(self, x: float, y: float) -> Point:
        """A place the model named."""
        if self.size is None or self.seen is None:
            return Point(_rounded(x), _rounded(y), inside=False)
        (width, height), (seen_width, seen_height) = self.size, self.seen
        x, y = _rounded(x * width / seen_width), _rounded(y * height / seen_height)
        return Point(x, y, inside=0 <= x < width and 0 <= y < height)


def _rounded(number: float) -> float:
    return round(number, 1) + 0.0  # which makes 0 of -0


def _action(call: Call, picture: _Picture) -> Action:
    needs = _NEEDS[call.name]
    for argument in needs:
        if argument not in call.arguments:
            raise Unreadable(f"{call.name} has no {argument}.")
    given = {each: call.arguments.get(each) for each in (*needs, *_MAY_HAVE.get(call.name, ()))}
    return Action(
        action=call.name,
        thought=call.thought,
        start=_point(call.name, "start_box", given.get("start_box"), picture),
        end=_point(call.name, "end_box", given.get("end_box"), picture),
        key=_key(given.get("key")),
        text=_text(given.get("content")),
        direction=_direction(given.get("direction")),
        raw=call.raw,
    )


def _point(name: ActionName, argument: str, said: str | None, picture: _Picture) -> Point | None:
    """A point, or the centre of a box."""
    if said is None:
        return None
    numbers = _TAGS.sub(" ", said).translate(_BRACKETS).split()
    if len(numbers) not in {2, 4} or not all(map(_NUMBER.fullmatch, numbers)):
        raise Unreadable(f"The {argument} of {name} is neither a point nor a box: {brief(said)}.")
    corners = [float(number) for number in numbers]
    return picture.point((corners[0] + corners[-2]) / 2, (corners[1] + corners[-1]) / 2)


def _key(said: str | None) -> str | None:
    if said is not None and not said.strip():
        raise Unreadable(f"{ActionName.HOTKEY} has no key.")
    return said


def _text(said: str | None) -> str | None:
    r"""Without the escapes that the model is told to use, and \\; other backslashes stay: C:\temp has no tab in it."""
    return None if said is None else _ESCAPE.sub(lambda escape: escape[1].replace("n", "\n"), said)


def _direction(said: str | None) -> str | None:
    direction = None if said is None else said.strip().lower()
    if direction is not None and direction not in _DIRECTIONS:
        raise Unreadable(f"The direction of {ActionName.SCROLL} is not known: {brief(direction)}.")
    return direction
