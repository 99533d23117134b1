"""Find the calls in the output of a UI-TARS model, with their arguments and the thoughts before them.

A model can write anything, so parsing takes time linear in the length of the text: patterns use possessive quantifiers,
which do not backtrack, and each part of the text is matched only a few times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from web.parsing.actions import ActionName, ParseError, shortened


@dataclass(frozen=True, slots=True)
class Call:
    """A call in the text. Its arguments have their canonical names (see `_ALIASES`), and are still escaped."""

    name: ActionName
    arguments: Mapping[str, str]
    thought: str | None
    raw: str


class Arguments(NamedTuple):
    """The canonical names of an action's arguments. Others are ignored."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


UI_TARS: Final[Mapping[ActionName, Arguments]] = {
    ActionName.CLICK: Arguments(("start_box",)),
    ActionName.LEFT_DOUBLE: Arguments(("start_box",)),
    ActionName.RIGHT_SINGLE: Arguments(("start_box",)),
    ActionName.DRAG: Arguments(("start_box", "end_box")),
    ActionName.MOVE_TO: Arguments(("start_box",)),
    ActionName.MOUSE_DOWN: Arguments((), ("start_box", "button")),
    ActionName.MOUSE_UP: Arguments((), ("start_box", "button")),
    ActionName.HOTKEY: Arguments(("key",)),
    ActionName.PRESS: Arguments(("key",)),
    ActionName.RELEASE: Arguments(("key",)),
    ActionName.TYPE: Arguments(("content",)),
    ActionName.SCROLL: Arguments(("direction",), ("start_box",)),
    ActionName.WAIT: Arguments((), ("time",)),
    ActionName.TAKE_SCREENSHOT: Arguments(),
    ActionName.OPEN_COMPUTER: Arguments(),
    ActionName.FINISHED: Arguments((), ("content",)),
    ActionName.CALL_USER: Arguments((), ("content",)),
    ActionName.LONG_PRESS: Arguments(("start_box",), ("time",)),
    ActionName.SWIPE: Arguments(("start_box", "end_box")),
    ActionName.OPEN_APP: Arguments(("app_name",)),
    ActionName.PRESS_HOME: Arguments(),
    ActionName.PRESS_BACK: Arguments(),
    ActionName.PRESS_ENTER: Arguments(),
}
"""The actions of UI-TARS on desktops and phones, in all its versions."""
_ALIASES: Final[Mapping[str, str]] = {
    "point": "start_box",
    "start_point": "start_box",
    "end_point": "end_box",
    "hotkey": "key",
    "text": "content",
}
_ARGUMENTS: Final = ("direction", "app_name", "time", "button", *_ALIASES, *_ALIASES.values())

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*+"
_COLON: Final = r"[ \t]*+[:\uff1a]"  # U+FF1A is the full-width colon of Chinese input methods
_CALL: Final = rf"(?P<name>{_NAME})\("
_ACTION_LABEL: Final = rf"Action{_COLON}\s*+"
_CALL_ON_LINE: Final = re.compile(rf"^[ \t]*+{_ACTION_LABEL}{_CALL}", re.MULTILINE)
_CALL_ANYWHERE: Final = re.compile(rf"\b{_ACTION_LABEL}{_CALL}")
_CALL_AT_START: Final = re.compile(rf"\s*+(?P<name>{'|'.join(UI_TARS)})\(")
_UNKNOWN_CALL_AT_START: Final = re.compile(rf"\s*+{_CALL}")
_NEXT_CALL: Final = re.compile(rf"[\s;]*+(?:{_ACTION_LABEL})?{_CALL}")
_THOUGHT: Final = re.compile(rf"^[ \t]*+Thought{_COLON}|\bAction_Summary{_COLON}", re.MULTILINE)
_REFLECTION: Final = re.compile(rf"^[ \t]*+Reflection{_COLON}", re.MULTILINE)

_ARGUMENT: Final = re.compile(rf"[\s,]*+(?P<name>{_NAME})\s*+=\s*+")
_CLOSE: Final = re.compile(r"[\s,]*+\)")
_UNQUOTED: Final = re.compile(r"[(\[][^()\[\]'\"]*+[)\]]|[^\s,()\[\]'\"]++")
_QUOTE_OR_ESCAPE: Final = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "'\""}
_NEXT_ARGUMENT: Final = rf"\s*+,\s*+(?:{'|'.join(_ARGUMENTS)})\s*+="  # known names only: typed code may have any
_CALL_END: Final = rf"{_CLOSE.pattern}(?=[^\S\n]*+(?:[\n;<]|\Z|{_ACTION_LABEL}|{_NAME}\())"
_AFTER_STRING: Final = re.compile(f"{_NEXT_ARGUMENT}|{_CALL_END}")


def parse_calls(text: str) -> Iterator[Call]:
    """Yield the calls of a text in order.

    Further "Action:" lines may follow, each with a thought of its own. Other words after a call are ignored.

    Raises:
        ParseError: there is no call, or a call is unknown or malformed.
    """
    section = (
        _CALL_AT_START.match(text)
        or _CALL_ON_LINE.search(text)
        or _CALL_ANYWHERE.search(text)
        or _UNKNOWN_CALL_AT_START.match(text)
    )
    if section is None:
        raise ParseError('The text has no action. An action is "Action:" and a call, for example wait().')
    thought = thought_in(text[: section.start()], allow_unlabeled=True)
    while section:
        opening: re.Match[str] | None = section
        while opening:
            call, end = _call(opening, thought)
            yield call
            opening = _NEXT_CALL.match(text, end)
        section = _CALL_ON_LINE.search(text, end)
        thought = (thought_in(text[end : section.start()]) if section else None) or thought


def thought_in(before: str, *, allow_unlabeled: bool = False) -> str | None:
    """Return the thought or summary in the text before an action, otherwise the reflection.

    Args:
        allow_unlabeled: if the text has none of these labels, return all of it.
    """
    label = _THOUGHT.search(before) or _REFLECTION.search(before)
    if label is None:
        return (before.strip() or None) if allow_unlabeled else None
    return before[label.end() :].strip() or None


def _call(opening: re.Match[str], thought: str | None) -> tuple[Call, int]:
    """Parse the call that begins with `opening`; return it and its end position."""
    text, position, name = opening.string, opening.end(), action_name(opening["name"])
    arguments: dict[str, str] = {}
    while not (closing := _CLOSE.match(text, position)):
        argument = _ARGUMENT.match(text, position)
        if argument is None:
            raise ParseError(f"The arguments of {name} are malformed or incomplete.")
        value, position = _value(text, argument.end(), name)
        arguments.setdefault(canonical(argument["name"]), value)
    return Call(name, arguments, thought, text[opening.start("name") : closing.end()]), closing.end()


def canonical(argument: str) -> str:
    """Return the canonical name of an argument, which differs between versions of UI-TARS."""
    return _ALIASES.get(argument, argument)


def action_name(name: str) -> ActionName:
    """Return the action of UI-TARS with this name.

    Raises:
        ParseError: there is none.
    """
    if name not in UI_TARS:
        raise ParseError(f"Unknown action {shortened(name)}.")
    return ActionName(name)


def _value(text: str, start: int, name: ActionName) -> tuple[str, int]:
    """Parse the value at `start`; return it and its end position. Numbers, points and single words need no quotes."""
    quote = text[start : start + 1]
    if quote in _QUOTE_OR_ESCAPE:
        end = _end_of_string(text, start + 1, quote)
        if end is None:
            raise ParseError(f"A string in {name} is not closed.")
        return text[start + 1 : end], end + 1
    unquoted = _UNQUOTED.match(text, start)
    if unquoted is None:
        raise ParseError(f"The arguments of {name} are malformed or incomplete.")
    return unquoted[0], unquoted.end()


def _end_of_string(text: str, start: int, quote: str) -> int | None:
    """Return the position of the closing quote.

    Models forget to escape quotes. Therefore the first quote is taken after which another argument or the end of the
    call follows; a call ends at the end of a line, or where another call follows. If there is none, the first quote
    before any other closing parenthesis is taken, unless its line has a better one. No call follows on that line then,
    so no line is searched twice.
    """
    fallback, limit = None, len(text)
    for match in _QUOTE_OR_ESCAPE[quote].finditer(text, start):
        position = match.start()
        if position > limit:
            break
        if match[0] != quote:
            continue
        if _AFTER_STRING.match(text, position + 1):
            return position
        if fallback is None and _CLOSE.match(text, position + 1):
            fallback, limit = position, _end_of_line(text, position)
    return fallback


def _end_of_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end
