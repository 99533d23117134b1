"""Messages of peers that are older or newer than this code: while an upgrade rolls, both are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, Final, TypeVar

E = TypeVar("E", bound=Enum)

to_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""One line of JSON without spaces. `json.dumps` would make an encoder for each call."""


def paired(flat: Sequence[str]) -> dict[str, str]:
    """The fields of a script's answer, in which names and values alternate."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def known(message: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has fields for; the rest is a newer peer's."""
    names = {field.name for field in fields(message)}
    return {name: value for name, value in data.items() if name in names}


def member(kind: type[E], value: object, otherwise: E) -> E:
    """The member of an enum with that value; `otherwise` for a value that only a newer peer knows."""
    try:
        return kind(value)
    except ValueError:
        return otherwise
