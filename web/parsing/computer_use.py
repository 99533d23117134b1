"""Parse calls of the functions `computer_use` and `mobile_use` into actions.

Qwen2.5-VL, Qwen3-VL and models made from them were trained with these functions. The models write calls as JSON, from
Qwen3.5 on as tags. If any part of the output is invalid, there are no actions at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from web.parsing.actions import Action, ActionName, ParseError, shortened
from web.parsing.coordinates import Point, Scale, corners_of, is_number
from web.parsing.tool_calls import FunctionCall, is_tagged, json_calls, tagged_calls

_Fields: TypeAlias = Mapping[str, str]
"""Names of the fields of `Action` by the names of the arguments that set them."""

_AT_POINT: Final[tuple[_Fields, _Fields]] = ({}, {"coordinate": "start"})
"""An action at a point or, without one, at the pointer."""
FUNCTIONS: Final[Mapping[str, Mapping[ActionName, tuple[_Fields, _Fields]]]] = {
    "computer_use": {
        ActionName.KEY: ({"keys": "key"}, {}),
        ActionName.TYPE: ({"text": "text"}, {}),
        ActionName.MOUSE_MOVE: ({"coordinate": "start"}, {}),
        ActionName.LEFT_CLICK: _AT_POINT,
        ActionName.LEFT_CLICK_DRAG: ({"coordinate": "end"}, {}),
        ActionName.RIGHT_CLICK: _AT_POINT,
        ActionName.MIDDLE_CLICK: _AT_POINT,
        ActionName.DOUBLE_CLICK: _AT_POINT,
        ActionName.TRIPLE_CLICK: _AT_POINT,
        ActionName.SCROLL: ({"pixels": "pixels"}, {"coordinate": "start"}),
        ActionName.HSCROLL: ({"pixels": "pixels"}, {"coordinate": "start"}),
        ActionName.WAIT: ({"time": "time"}, {}),
        ActionName.TERMINATE: ({"status": "status"}, {"text": "text"}),
        ActionName.ANSWER: ({"text": "text"}, {}),
    },
    "mobile_use": {
        ActionName.KEY: ({"text": "key"}, {}),
        ActionName.CLICK: ({"coordinate": "start"}, {}),
        ActionName.LONG_PRESS: ({"coordinate": "start"}, {"time": "time"}),
        ActionName.SWIPE: ({"coordinate": "start", "coordinate2": "end"}, {}),
        ActionName.TYPE: ({"text": "text"}, {}),
        ActionName.SYSTEM_BUTTON: ({"button": "button"}, {}),
        ActionName.OPEN: ({"text": "app"}, {}),
        ActionName.WAIT: ({"time": "time"}, {}),
        ActionName.TERMINATE: ({"status": "status"}, {"text": "text"}),
        ActionName.ANSWER: ({"text": "text"}, {}),
    },
}
"""The required and the optional arguments of each action."""
_BUTTONS: Final = frozenset({"Back", "Home", "Menu", "Enter"})
_STATUSES: Final = frozenset({"success", "failure"})


def parse(text: str, scale: Scale) -> list[Action]:
    """Return the actions in a text, at least one.

    Raises:
        ParseError: the text has no calls, or one of them is unknown or malformed.
    """
    actions = [_action(call, scale) for call in _calls(text)]
    if not actions:
        raise ParseError("The text has no call of computer_use or mobile_use.")
    return actions


def _calls(text: str) -> Iterator[FunctionCall]:
    return tagged_calls(text) if is_tagged(text) else json_calls(text)


def _action(call: FunctionCall, scale: Scale) -> Action:
    function = FUNCTIONS.get(call.name)
    if function is None:
        raise ParseError(f"Unknown function {shortened(call.name)}; known are computer_use and mobile_use.")
    written = call.arguments.get("action")
    name = next((each for each in function if each == written), None)
    if name is None:
        raise ParseError(f"Unknown action of {call.name}: {shortened(str(written))}.")
    required, optional = function[name]
    for argument in required:
        if call.arguments.get(argument) is None:
            raise ParseError(f"{name} needs the argument {argument}.")
    values = {
        field: _value(field, call.arguments[argument], scale, f"The {argument} of {name}")
        for argument, field in (*required.items(), *optional.items())
        if call.arguments.get(argument) is not None
    }
    return Action(action=name, raw=call.raw, thought=call.thought, **values)


def _value(field: str, value: Any, scale: Scale, what: str) -> Any:
    """Convert the value of an argument to that of a field of `Action`.

    Args:
        what: describes the argument in an error message.
    """
    return _CONVERSIONS[field](value, scale, what)


def _point(value: Any, scale: Scale, what: str) -> Point:
    """Convert a point, or a box, of which the center is returned."""
    corners = corners_of(value)
    if corners is None:
        raise ParseError(f"{what} is neither a point nor a box: {shortened(_written(value))}.")
    return scale.center(corners)


def _keys(value: Any, _scale: Scale, what: str) -> str:
    """Return keys in the notation of UI-TARS: "ctrl c". The space bar is called "space"."""
    keys = value
    if isinstance(value, str):
        keys = _json_list(value) or value.split("+") if value != "+" else [value]
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise ParseError(f"{what} must be a list of keys: {shortened(_written(value))}.")
    return " ".join(key.strip() or "space" for key in keys)


def _json_list(text: str) -> list[Any] | None:
    """Return the list that a text with tags holds as JSON; None if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _number(value: Any, _scale: Scale, what: str) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if number is None or not is_number(number):
        raise ParseError(f"{what} is not a number: {shortened(_written(value))}.")
    return float(number)


def _duration(value: Any, scale: Scale, what: str) -> str:
    _number(value, scale, what)
    return str(value).strip()


def _text(value: Any, _scale: Scale, what: str) -> str:
    if not isinstance(value, str):
        raise ParseError(f"{what} is not a text: {shortened(_written(value))}.")
    return value


def _one_of(allowed: frozenset[str]) -> Callable[[Any, Scale, str], str]:
    def choice(value: Any, _scale: Scale, what: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ParseError(f"{what} must be one of {', '.join(sorted(allowed))}: {shortened(_written(value))}.")
        return value

    return choice


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_CONVERSIONS: Final[Mapping[str, Callable[[Any, Scale, str], Any]]] = {
    "start": _point,
    "end": _point,
    "key": _keys,
    "text": _text,
    "app": _text,
    "pixels": _number,
    "time": _duration,
    "button": _one_of(_BUTTONS),
    "status": _one_of(_STATUSES),
}
