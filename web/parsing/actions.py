"""Actions on a user interface that a model requests, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from web.parsing.coordinates import Point


class ActionName(StrEnum):
    """All actions, under the names that the models use."""

    CLICK = "click"
    LEFT_DOUBLE = "left_double"
    RIGHT_SINGLE = "right_single"
    DRAG = "drag"
    MOVE_TO = "move_to"
    MOUSE_DOWN = "mouse_down"
    MOUSE_UP = "mouse_up"
    HOTKEY = "hotkey"
    PRESS = "press"
    """Press a key and hold it."""
    RELEASE = "release"
    TYPE = "type"
    SCROLL = "scroll"
    WAIT = "wait"
    """Wait a few seconds and take a new screenshot."""
    TAKE_SCREENSHOT = "take_screenshot"
    OPEN_COMPUTER = "open_computer"
    FINISHED = "finished"
    CALL_USER = "call_user"
    """The task cannot be solved without the user."""
    LONG_PRESS = "long_press"
    SWIPE = "swipe"
    OPEN_APP = "open_app"
    PRESS_HOME = "press_home"
    PRESS_BACK = "press_back"
    PRESS_ENTER = "press_enter"

    # Further names in calls of computer_use and mobile_use.
    KEY = "key"
    MOUSE_MOVE = "mouse_move"
    LEFT_CLICK = "left_click"
    LEFT_CLICK_DRAG = "left_click_drag"
    RIGHT_CLICK = "right_click"
    MIDDLE_CLICK = "middle_click"
    DOUBLE_CLICK = "double_click"
    TRIPLE_CLICK = "triple_click"
    HSCROLL = "hscroll"
    SYSTEM_BUTTON = "system_button"
    OPEN = "open"
    TERMINATE = "terminate"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """An action. Fields that do not apply to it are None.

    Attributes:
        raw: the call as the model wrote it.
        thought: what the model wrote before the action; it also applies to the actions that follow directly.
        start: where to act, or where a drag starts. Without it, the action applies at the pointer.
        end: where a drag or a swipe ends, or a scroll without a direction.
        key: keys to press together, separated by spaces: "ctrl c".
        text: the text to type, or the closing message. A line break at the end means Enter.
        direction: of a scroll: up, down, left or right. None if the scroll has an `end` or `pixels`.
        pixels: how far the mouse wheel turns; positive values scroll up (`scroll`).
        app: name of the app to open.
        button: of a phone or of the mouse.
        time: duration of a wait or a long press, as the model wrote it; None if it wrote none.
        status: whether a task that ends was completed: success or failure.
    """

    action: ActionName
    raw: str
    thought: str | None = None
    start: Point | None = None
    end: Point | None = None
    key: str | None = None
    text: str | None = None
    direction: str | None = None
    pixels: float | None = None
    app: str | None = None
    button: str | None = None
    time: str | None = None
    status: str | None = None


class ParseError(Exception):
    """The text does not have the requested form; the message gives the reason in one line."""


def shortened(text: str) -> str:
    """Quote a text of the model for a one-line message; cut it after 60 characters."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
