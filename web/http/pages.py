"""Pages of lists in OpenAI's format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from shared.errors import NotFound


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


def page_of(items: Sequence[T], limit: int, after: str | None) -> tuple[Sequence[T], bool]:
    """Return the page that follows an item, and whether there are more items after the page.

    Args:
        after: id of the last item of the previous page; None for the first page.

    Raises:
        NotFound: there is no such item.
    """
    start = 0
    if after is not None:
        start = next((i for i, item in enumerate(items, 1) if item.id == after), -1)
        if start < 0:
            raise NotFound("after must be the id of an item of the list.", field="after")
    return items[start : start + limit], len(items) > start + limit
