"""Parse points and boxes that a model returns as JSON, as Qwen2.5-VL and Qwen3-VL do when asked for positions.

    [{"bbox_2d": [12, 34, 56, 78], "label": "Save button"}, {"point_2d": [100, 200], "label": "search field"}]

If any part of the output is invalid, there are no regions at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from web.parsing.actions import ParseError, shortened
from web.parsing.coordinates import Box, Point, Scale, corners_of
from web.parsing.tool_calls import decode

_POINT_KEYS: Final = ("point_2d", "point")
_BOX_KEYS: Final = ("bbox_2d", "bbox")
_REASONING_END: Final = "</think>"
_START: Final = re.compile(r'\[\s*+(?=\{\s*+"|\])|(?=\{\s*+")')
_NEXT: Final = re.compile(r"[\s,]*+(?=\{)")
_LIST_END: Final = re.compile(r"[\s,]*+\]")


@dataclass(frozen=True, slots=True)
class Region:
    """A place in the image.

    Attributes:
        label: the model's description of it.
        point: the point, or the center of the box.
        box: None for a point.
        raw: the object as the model wrote it.
    """

    label: str | None
    point: Point
    box: Box | None
    raw: str


def parse(text: str, scale: Scale) -> list[Region]:
    """Return the regions in a text; none if the text has an empty list.

    Raises:
        ParseError: the text has no JSON with regions, or one of them is malformed.
    """
    answer = text.rpartition(_REASONING_END)[2]
    start = _START.search(answer)
    if start is None:
        raise ParseError(f"The text has no JSON with {', '.join((*_BOX_KEYS, *_POINT_KEYS))}.")
    return [_region(found, raw, scale) for found, raw in _objects(answer, start.end(), in_list="[" in start[0])]


def _objects(text: str, position: int, *, in_list: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a list, or those that follow each other without one, each with its text."""
    while following := _NEXT.match(text, position):
        found, position = decode(text, following.end())
        yield found, text[following.end() : position]
    if in_list and not _LIST_END.match(text, position):
        raise ParseError("The list of regions is incomplete.")


def _region(found: dict[str, Any], raw: str, scale: Scale) -> Region:
    label = found.get("label")
    if label is not None and not isinstance(label, str):
        raise ParseError(f"The label of a region is not a text: {shortened(raw)}.")
    for key in _BOX_KEYS:
        if key in found:
            corners = _numbers(found[key], 4, key)
            return Region(label, scale.center(corners), scale.box(*corners), raw)
    for key in _POINT_KEYS:
        if key in found:
            return Region(label, scale.point(*_numbers(found[key], 2, key)), None, raw)
    raise ParseError(f"A region has none of {', '.join((*_BOX_KEYS, *_POINT_KEYS))}: {shortened(raw)}.")


def _numbers(value: Any, count: int, key: str) -> list[float]:
    corners = corners_of(value)
    if corners is None or len(corners) != count:
        raise ParseError(f"{key} must be a list of {count} numbers: {shortened(str(value))}.")
    return corners
