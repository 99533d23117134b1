"""Marks: they tell that two requests begin alike, so that the second can go where the first's prefix is kept.

A mark is a hash of a beginning and of whose it is: it tells no text, and nothing of one API key fits another's. Only of
a system message that is shared the mark is the same for everybody, as is what the workers keep of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from shared.jobs.request import Request

LEAST: Final = 256
"""Bytes of text; to read a shorter beginning again costs nothing that is worth waiting for."""
CUTS: Final = (2**10, 2**12, 2**14)
"""Where a first question is marked, beside its end: another may be asked of the same text."""
_LAST_ENDS: Final = 3
"""A conversation goes on by two messages, and the last one may be asked in another way."""
_EVERYBODY: Final = ""


def marks(asked: Request, owner: str) -> tuple[str, ...]:
    """Those of a request's beginnings that matter, of the longest first: five at most, of 16 hex digits."""
    texts = _texts(asked)
    text, ends = b"".join(texts), [*accumulate(map(len, texts))]
    places = {ends[0], *ends[-_LAST_ENDS:]}
    if len(ends) <= 2:
        places.update(cut for cut in CUTS if cut < ends[-1])
    shared = {ends[0]} if asked.share_system_prompt else set()
    found = dict(_hashes(asked.model, owner, text, places - shared))
    found.update(_hashes(asked.model, _EVERYBODY, text, shared))
    return tuple(found[place] for place in sorted(found, reverse=True))


def _texts(asked: Request) -> list[bytes]:
    if asked.messages is None:
        return [(asked.prompt or "").encode(errors="replace")]
    return [f"{each['role']}\n{each['content']}\n".encode(errors="replace") for each in asked.messages]


def _hashes(model: str, whose: str, text: bytes, places: Iterable[int]) -> Iterator[tuple[int, str]]:
    """For each place that is far enough from the start, the hash of all before it."""
    so_far, start = hashlib.blake2b(f"{model}\0{whose}\0".encode(), digest_size=8, person=b"mlxq.mark"), 0
    for place in sorted(place for place in places if place >= LEAST):
        so_far.update(text[start:place])
        yield place, so_far.hexdigest()
        start = place
