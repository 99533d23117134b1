"""Calls in the text of a UI-TARS model: where they are, their arguments, and what was thought before them.

The text is a model's, so anything may be in it. It is read from front to back in time linear in its length: patterns
take what they can and give nothing back, and none is tried twice over the same stretch but for a few times.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class ActionName(StrEnum):
    """What can be done, in the model's words."""

    CLICK = "click"
    LEFT_DOUBLE = "left_double"
    RIGHT_SINGLE = "right_single"
    DRAG = "drag"
    HOTKEY = "hotkey"
    TYPE = "type"
    SCROLL = "scroll"
    WAIT = "wait"
    """Some seconds, and then another look."""
    FINISHED = "finished"
    CALL_USER = "call_user"
    """The task cannot be solved without the user."""


class Unreadable(Exception):
    """This is no answer of UI-TARS; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as it stands in the text, its arguments by their first names and still escaped."""

    name: ActionName
    arguments: Mapping[str, str]
    thought: str | None
    raw: str


_ALIASES: Final[Mapping[str, str]] = {
    "point": "start_box",
    "start_point": "start_box",
    "end_point": "end_box",
    "hotkey": "key",
    "text": "content",
}
_ARGUMENTS: Final = ("direction", *_ALIASES, *_ALIASES.values())

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*+"
_COLON: Final = r"[ \t]*+[:\uff1a]"  # the second is the one of Chinese keyboards
_CALL: Final = rf"(?P<name>{_NAME})\("
_MARK: Final = rf"Action{_COLON}\s*+"
_ON_A_LINE: Final = re.compile(rf"^[ \t]*+{_MARK}{_CALL}", re.MULTILINE)
_ANYWHERE: Final = re.compile(rf"\b{_MARK}{_CALL}")
_AT_ONCE: Final = re.compile(rf"\s*+(?P<name>{'|'.join(ActionName)})\(")
_UNKNOWN_AT_ONCE: Final = re.compile(rf"\s*+{_CALL}")
_ANOTHER: Final = re.compile(rf"[\s;]*+(?:{_MARK})?{_CALL}")
_SAID: Final = re.compile(rf"^[ \t]*+Thought{_COLON}|\bAction_Summary{_COLON}", re.MULTILINE)
_REFLECTION: Final = re.compile(rf"^[ \t]*+Reflection{_COLON}", re.MULTILINE)

_ARGUMENT: Final = re.compile(rf"[\s,]*+(?P<name>{_NAME})\s*+=\s*+")
_CLOSE: Final = re.compile(r"[\s,]*+\)")
_UNQUOTED: Final = re.compile(r"[(\[][^()\[\]'\"]*+[)\]]|[^\s,()\[\]'\"]++")
_QUOTE_OR_ESCAPE: Final = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "'\""}
_GOES_ON: Final = rf"\s*+,\s*+(?:{'|'.join(_ARGUMENTS)})\s*+="  # any name would do for code that is typed
_ENDS: Final = rf"{_CLOSE.pattern}(?=[^\S\n]*+(?:[\n;<]|\Z|{_MARK}|{_NAME}\())"
_AFTER_A_STRING: Final = re.compile(f"{_GOES_ON}|{_ENDS}")


def calls(text: str) -> Iterator[Call]:
    """Calls in their order. A new "Action:" may follow with a thought of its own; other words after a call are none.

    Raises:
        Unreadable: there is none, or one of them is not known or cannot be read.
    """
    section = _AT_ONCE.match(text) or _ON_A_LINE.search(text) or _ANYWHERE.search(text) or _UNKNOWN_AT_ONCE.match(text)
    if section is None:
        raise Unreadable('There is no action in it: "Action:" and a call such as wait().')
    thought = _thought(text[: section.start()], unnamed=True)
    while section:
        opened: re.Match[str] | None = section
        while opened:
            call, end = _call(opened, thought)
            yield call
            opened = _ANOTHER.match(text, end)
        section = _ON_A_LINE.search(text, end)
        thought = (_thought(text[end : section.start()]) if section else None) or thought


def _thought(before: str, *, unnamed: bool = False) -> str | None:
    """What is said before an action: a thought or a summary, else a reflection, else, if `unnamed` will do, all."""
    said = _SAID.search(before) or _REFLECTION.search(before)
    if said is None:
        return (before.strip() or None) if unnamed else None
    return before[said.end() :].strip() or None


def _call(opened: re.Match[str], thought: str | None) -> tuple[Call, int]:
    """The call that is opened there, and where it ends."""
    text, at, name = opened.string, opened.end(), _known(opened["name"])
    arguments: dict[str, str] = {}
    while not (closed := _CLOSE.match(text, at)):
        argument = _ARGUMENT.match(text, at)
        if argument is None:
            raise Unreadable(f"The arguments of {name} cannot be read, or are cut off.")
        value, at = _value(text, argument.end(), name)
        arguments.setdefault(_ALIASES.get(argument["name"], argument["name"]), value)
    return Call(name, arguments, thought, text[opened.start("name") : closed.end()]), closed.end()


def _known(name: str) -> ActionName:
    try:
        return ActionName(name)
    except ValueError:
        raise Unreadable(f"There is no action of this name: {brief(name)}.") from None


def _value(text: str, start: int, name: ActionName) -> tuple[str, int]:
    """The value that begins there, and where it ends. Numbers and single words are known without quotes too."""
    quote = text[start : start + 1]
    if quote in _QUOTE_OR_ESCAPE:
        end = _end_of_string(text, start + 1, quote)
        if end is None:
            raise Unreadable(f"A string in {name} has no end, or the call is cut off.")
        return text[start + 1 : end], end + 1
    unquoted = _UNQUOTED.match(text, start)
    if unquoted is None:
        raise Unreadable(f"The arguments of {name} cannot be read, or are cut off.")
    return unquoted[0], unquoted.end()


def _end_of_string(text: str, start: int, quote: str) -> int | None:
    """Where the closing quote is. Models forget to escape, so it is the first after which the call goes on or ends.

    A call ends where its line does, or where another follows. A quote before any other parenthesis counts when its
    line has none better. (No call follows on that line then, so that no line is looked through twice.)
    """
    second_best, last = None, len(text)
    for found in _QUOTE_OR_ESCAPE[quote].finditer(text, start):
        at = found.start()
        if at > last:
            break
        if found[0] != quote:
            continue
        if _AFTER_A_STRING.match(text, at + 1):
            return at
        if second_best is None and _CLOSE.match(text, at + 1):
            second_best, last = at, _end_of_line(text, at)
    return second_best


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def brief(said: str) -> str:
    """Something the model wrote, for one line."""
    return repr(said if len(said) <= 60 else f"{said[:60]}…")
