r"""Parse the output of a UI-TARS model into actions, with coordinates in pixels of the image in the request.

Versions 1.0 and 1.5 write calls:

    Thought: The search field is empty.
    Action: click(start_box='(197,525)')

    type(content='weather\n')

Version 2 writes tags, with coordinates in thousandths of the image:

    <gui_think>The search field is empty.</gui_think>
    <seed:tool_call><function=click><parameter=point><point>197 525</point></parameter></function></seed:tool_call>

If any part of the output is invalid, there are no actions at all: carrying out only some of them could do harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from web.parsing.actions import Action, ActionName, ParseError, shortened
from web.parsing.coordinates import Point, Scale, corners_of
from web.parsing.tool_calls import is_tagged, tagged_calls
from web.parsing.ui_tars_calls import UI_TARS, Call, action_name, canonical, parse_calls

_SWIPE: Final = ("start_box", "end_box")
"""The arguments of a scroll on phones in the first version of UI-TARS, instead of a direction."""
_DIRECTIONS: Final = frozenset({"up", "down", "left", "right"})
_ESCAPE: Final = re.compile(r"\\(['\"n\\])")


def parse(text: str, scale: Scale) -> list[Action]:
    """Return the actions in a text, at least one.

    Raises:
        ParseError: the text has no actions, or one of them is unknown or malformed.
    """
    if is_tagged(text):
        return [_action(call, scale.in_thousandths()) for call in _tagged_calls(text)]
    return [_action(call, scale) for call in parse_calls(text)]


def _tagged_calls(text: str) -> Iterator[Call]:
    for call in tagged_calls(text):
        arguments = {canonical(name): value for name, value in call.arguments.items()}
        yield Call(action_name(call.name), arguments, call.thought, call.raw)


def _action(call: Call, scale: Scale) -> Action:
    is_swipe = call.name is ActionName.SCROLL and "end_box" in call.arguments and "direction" not in call.arguments
    known = UI_TARS[call.name]
    required: Sequence[str] = _SWIPE if is_swipe else known.required
    for argument in required:
        if argument not in call.arguments:
            raise ParseError(f"{call.name} needs the argument {argument}.")
    used = {name: call.arguments.get(name) for name in (*required, *known.optional)}
    return Action(
        action=call.name,
        raw=call.raw,
        thought=call.thought,
        start=_point(call.name, "start_box", used.get("start_box"), scale),
        end=_point(call.name, "end_box", used.get("end_box"), scale),
        key=_filled(call.name, "key", used.get("key")),
        text=_unescaped(used.get("content")),
        direction=_direction(used.get("direction")),
        app=_filled(call.name, "app_name", _unescaped(used.get("app_name"))),
        button=_filled(call.name, "button", used.get("button")),
        time=(used.get("time") or "").strip() or None,
    )


def _point(name: ActionName, argument: str, value: str | None, scale: Scale) -> Point | None:
    """Parse a point, or a box, of which the center is returned."""
    if value is None:
        return None
    corners = corners_of(value)
    if corners is None:
        raise ParseError(f"The {argument} of {name} is neither a point nor a box: {shortened(value)}.")
    return scale.center(corners)


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
