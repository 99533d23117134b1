"""The actions in an answer of UI-TARS, as data: what to click, drag, type, and where in the image that was sent.

An answer is a thought and one or more calls, as `Thought: …`, `Action: click(start_box='(197,525)')`. The model's
coordinates are pixels of the image as its processor resized it; here they are pixels of the image itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shared.image_geometry import ImageGeometry

_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "click": ("start",), "left_double": ("start",), "right_single": ("start",), "drag": ("start", "end"),
    "hotkey": ("key",), "type": ("content",), "scroll": ("direction",), "wait": (), "finished": (), "call_user": (),
}  # fmt: skip
"""Of each action, what it cannot be without."""
_NAMES: Final = {
    "start_box": "start", "start_point": "start", "point": "start", "end_box": "end", "end_point": "end",
    "content": "content", "key": "key", "direction": "direction",
}  # fmt: skip
DIRECTIONS: Final = ("up", "down", "left", "right")

_ACTION: Final = re.compile(r"^[ \t]*Action[ \t]*[::]", re.MULTILINE)
_LABEL: Final = re.compile(r"^[ \t]*(?:Thought|Reflection|Action_Summary)[ \t]*[::][ \t]*", re.MULTILINE)
_CALL: Final = re.compile(r"([a-z_]{1,32})[ \t]*\(")
_ARGUMENT: Final = re.compile(r"\s*([a-z_]{1,32})\s*=\s*")
_NUMBER: Final = re.compile(r"-?\d{1,9}(?:\.\d{1,9})?")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the image that was sent, in pixels, to a tenth.

    Attributes:
        inside: whether it is a place of the image at all; it is told as the model said it, also if not.
    """

    x: float
    y: float
    inside: bool


@dataclass(frozen=True, slots=True)
class Action:
    """One call of an answer.

    Attributes:
        raw: as the model wrote it.
        text: what to type, or what `finished` says; a newline at its end submits what is typed.
    """

    action: str
    raw: str
    thought: str | None = None
    start: Point | None = None
    end: Point | None = None
    key: str | None = None
    text: str | None = None
    direction: str | None = None


class _Fault(Exception):
    """Why a text is no answer; what the caller is told."""


def parse(text: str, size: tuple[int, int] | None, geometry: ImageGeometry | None) -> tuple[list[Action], str | None]:
    """The actions of an answer.

    Args:
        size: width and height of the image that was asked about; None: there was none, and no place can be told.
        geometry: how the model resized it.

    Returns:
        The actions, and why there are none, or no more of them, in one line.
    """
    thought, calls = _split(text)
    actions: list[Action] = []
    try:
        scale = _scale(size, geometry)
        for name, arguments, raw in _calls(calls):
            actions.append(_action(name, arguments, raw, thought, size, scale))
    except _Fault as fault:
        return actions, str(fault)
    return actions, None if actions else "the text has no action"


def _split(text: str) -> tuple[str | None, str]:
    """The thought, and the calls behind it."""
    found = _ACTION.search(text)
    before, calls = (text[: found.start()], text[found.end() :]) if found else ("", text)
    return _LABEL.sub("", before).strip() or None, calls


def _scale(size: tuple[int, int] | None, geometry: ImageGeometry | None) -> tuple[float, float] | None:
    if size is None or geometry is None:
        return None
    try:
        wide, high = geometry.resized(*size)
    except ValueError as error:
        raise _Fault(f"no place can be told in an image of such a shape: {error}") from error
    return size[0] / wide, size[1] / high


def _calls(text: str) -> Iterator[tuple[str, dict[str, str], str]]:
    """Name, arguments and text of each call."""
    place = 0
    while found := _CALL.search(text, place):
        arguments, place = _arguments(text, found.end(), found[1])
        yield found[1], arguments, text[found.start() : place]


def _arguments(text: str, place: int, call: str) -> tuple[dict[str, str], int]:
    """What is between the brackets, and where they close."""
    arguments: dict[str, str] = {}
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text[place : place + 1] == ")":
            return arguments, place + 1
        found = _ARGUMENT.match(text, place)
        if found is None:
            raise _Fault(f"the arguments of {call} cannot be read")
        value, place = _value(text, found.end(), call)
        arguments[_NAMES.get(found[1], found[1])] = value


def _value(text: str, place: int, call: str) -> tuple[str, int]:
    """A quoted text with its escapes undone, and where it ends."""
    quote = text[place : place + 1]
    if quote not in ("'", '"'):
        raise _Fault(f"an argument of {call} is not in quotes")
    said: list[str] = []
    place += 1
    while place < len(text):
        character = text[place]
        if character == "\\" and place + 1 < len(text):
            said.append(_ESCAPES.get(text[place + 1], text[place + 1]))
            place += 2
        elif character == quote and _closes(text, place + 1):
            return "".join(said), place + 1
        else:
            said.append(character)
            place += 1
    raise _Fault(f"an argument of {call} does not end")


def _closes(text: str, place: int) -> bool:
    """Whether a quote before this place ends its text: models forget to escape those of an apostrophe."""
    while place < len(text) and text[place] in " \t":
        place += 1
    return text[place : place + 1] in (")", ",", "")


def _action(
    name: str,
    arguments: dict[str, str],
    raw: str,
    thought: str | None,
    size: tuple[int, int] | None,
    scale: tuple[float, float] | None,
) -> Action:
    needed = _NEEDED.get(name)
    if needed is None:
        raise _Fault(f"{name} is no action")
    if missing := next((each for each in needed if each not in arguments), None):
        raise _Fault(f"{name} lacks its {missing}")
    direction = arguments.get("direction", "").strip().lower() or None
    if direction is not None and direction not in DIRECTIONS:
        raise _Fault(f"{name} has a direction that is none")
    start, end = (_point(name, arguments.get(each), size, scale) for each in ("start", "end"))
    return Action(
        action=name,
        raw=raw,
        thought=thought,
        start=start,
        end=end,
        key=arguments.get("key"),
        text=arguments.get("content"),
        direction=direction,
    )


def _point(call: str, box: str | None, size: tuple[int, int] | None, scale: tuple[float, float] | None) -> Point | None:
    """The place that a box or a point names; of a box with two corners its middle."""
    if box is None or not box.strip():
        return None
    numbers = [float(each) for each in _NUMBER.findall(box)]
    if len(numbers) not in (2, 4):
        raise _Fault(f"{call} has a place of {len(numbers)} numbers")
    if size is None or scale is None:
        return None
    x, y = (numbers[0] + numbers[-2]) / 2 * scale[0], (numbers[1] + numbers[-1]) / 2 * scale[1]
    return Point(round(x, 1), round(y, 1), 0 <= x < size[0] and 0 <= y < size[1])
