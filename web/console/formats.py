"""How pages write numbers, times and sizes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_LONG: Final = ((3600, "min", 60, "s", 1), (86_400, "h", 3600, "min", 60), (math.inf, "d", 86_400, "h", 3600))
"""For durations below the first number: a unit and its seconds, and the next smaller unit."""
_NONE: Final = "\N{EN DASH}"


def size(count: float | None) -> str:
    """Write a number of bytes: `1.5 GiB`."""
    if count is None:
        return _NONE
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """Write a duration with two or three digits: `45 ms`, `3.2 s`, `4 min 10 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return _NONE
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    _, large, length, small, part = next(row for row in _LONG if seconds < row[0])
    rest = int(seconds % length // part)
    return f"{int(seconds // length)} {large}" + (f" {rest} {small}" if rest else "")


def age(at: float | None) -> str:
    """Write how long ago a time was, in seconds since the epoch."""
    return _NONE if at is None else f"{duration(max(0.0, time.time() - at))} ago"


def iso(at: float | None) -> str:
    """Write a time as ISO 8601; pages show it in the time zone of the browser."""
    return "" if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def stamp(at: float | None) -> str:
    """Write a time in UTC, for browsers without JavaScript."""
    return _NONE if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def count(number: float | None) -> str:
    """Write a number with separators: `12,345`."""
    return _NONE if number is None else f"{number:,.0f}"


def indented_json(value: object) -> str:
    """Write a value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


FILTERS: Final[Mapping[str, Callable[[Any], str]]] = {
    "size": size, "duration": duration, "age": age, "iso": iso, "stamp": stamp, "count": count, "to_json": indented_json
}  # fmt: skip
