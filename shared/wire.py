"""Reading messages of older and newer processes: during a rolling upgrade both run side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, Final, TypeVar

E = TypeVar("E", bound=Enum)

to_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Encode a value as one line of JSON without spaces. `json.dumps` would create an encoder for each call."""


def valid_unicode(text: str) -> str:
    """Replace halves of surrogate pairs, which UTF-8 cannot have, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pairs_to_dict(flat: Sequence[str]) -> dict[str, str]:
    """Convert a script's reply of alternating names and values to a dictionary."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def known_fields(message: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the entries that the dataclass `message` has no field for; newer processes may write more fields."""
    names = {field.name for field in fields(message)}
    return {name: value for name, value in data.items() if name in names}


def enum_member(kind: type[E], value: object, default: E) -> E:
    """Return the enum member with this value; `default` for a value that only newer processes know."""
    try:
        return kind(value)
    except ValueError:
        return default
