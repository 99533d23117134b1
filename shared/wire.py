"""Messages of peers that are older or newer than this code: while an upgrade rolls, both are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def known(message: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has fields for; the rest is a newer peer's."""
    names = {field.name for field in fields(message)}
    return {name: value for name, value in data.items() if name in names}
