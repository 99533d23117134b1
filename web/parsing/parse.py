"""Parse the text of a job in the format that its request asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from shared.jobs.record import Parsing
from shared.models.image_geometry import ImageGeometry
from shared.models.registry import ModelCard
from web.parsing import computer_use, grounding, ui_tars
from web.parsing.actions import ParseError
from web.parsing.coordinates import THOUSANDTHS, Scale

_PARSERS: Final[Mapping[str, tuple[str, Callable[[str, Scale], list[Any]]]]] = {
    "ui_tars": ("actions", ui_tars.parse),
    "computer_use": ("actions", computer_use.parse),
    "grounding": ("regions", grounding.parse),
}
"""For each format, the field of an answer that has the result, and the parser."""


MAX_RESULTS: Final = 1000
"""Maximum actions or regions in a text."""


def field_of(format_: str) -> str | None:
    """Return the field of an answer that has the result; None for a format that only newer versions know."""
    return _PARSERS[format_][0] if format_ in _PARSERS else None


def parse(text: str, parsing: Parsing, card: ModelCard | None) -> tuple[list[Any], str | None]:
    """Return the actions or regions in a text, or an empty list and the reason in one line.

    Args:
        card: the card of the model that wrote the text; without it, coordinates are taken as pixels of the image.
    """
    _, parser = _PARSERS[parsing.format]
    try:
        found = parser(text, _scale(parsing, card))
        _check_number(found, field_of(parsing.format))
        _check_unicode(found)
        return found, None
    except ParseError as error:
        return [], str(error)
    except RecursionError:
        return [], "The JSON is nested too deeply."


def _check_number(found: list[Any], field: str | None) -> None:
    """Refuse more results than any model means: a list of jobs that have them would take gigabytes."""
    if len(found) > MAX_RESULTS:
        raise ParseError(f"The text has {len(found)} {field}, more than the limit of {MAX_RESULTS}.")


def _check_unicode(found: list[Any]) -> None:
    """Refuse half of a surrogate pair, which an escape in JSON can be. No answer can contain it."""
    try:
        for each in found:
            for field in fields(each):
                str(getattr(each, field.name)).encode()
    except UnicodeEncodeError as error:
        raise ParseError("The JSON has half of a surrogate pair, which is no character.") from error


def _scale(parsing: Parsing, card: ModelCard | None) -> Scale:
    size, geometry = parsing.image_size, card.geometry if card else None
    try:
        match parsing.coordinates:
            case "thousandths":
                return Scale(size, THOUSANDTHS, requested=True)
            case "pixels":
                return Scale(size, size, requested=True)
            case "resized":
                return _resized(size, geometry)
        return Scale.of(size, geometry, card.coordinate_kind) if card else Scale(size, size)
    except ValueError as error:
        raise ParseError(f"The image has no valid coordinates: {error}.") from error


def _resized(size: tuple[int, int] | None, geometry: ImageGeometry | None) -> Scale:
    if geometry is None:
        raise ParseError("The coordinates cannot be converted: the size to which the model resizes images is unknown.")
    return Scale(size, geometry.resized(*size) if size else None, requested=True)
