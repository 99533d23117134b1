"""Errors of a job request that was made of another body: they name the fields of that body."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError

from shared.errors import Invalid, MlxqError
from web.http.problems import errors_of


@contextmanager
def named_fields(original: Callable[[str], str]) -> Iterator[None]:
    """Let errors name the fields of the request's body instead of those of the job request.

    Args:
        original: returns the field of the body that became a field of the job request.

    Raises:
        Invalid: in place of pydantic's error, if the job request is invalid.
    """
    try:
        yield
    except ValidationError as error:
        first = errors_of(error)[0]
        field = original(first.field) if first.field else None
        raise Invalid(f"{field}: {first.detail}" if field else first.detail, field=field) from error
    except MlxqError as error:
        if error.field is not None:
            field = original(error.field)
            error.detail = re.sub(rf"(?<![\w.]){re.escape(error.field)}(?!\w)", lambda _: field, error.detail)
            error.field = field
        raise


def renamed(field: str, names: Mapping[str, str]) -> str:
    """Return a field with the first of its prefixes in `names` replaced; the field itself if there is none."""
    for name, original in names.items():
        if field == name or field.startswith((f"{name}.", f"{name}[")):
            return original + field[len(name) :]
    return field
