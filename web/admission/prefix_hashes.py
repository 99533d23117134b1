"""Prefix hashes of requests, by which a claim finds the worker whose prefix cache holds a job's prefix.

A hash covers the text of a prefix and the API key: it reveals no text, and those of two keys never match. Only the hash
of a shared system message is the same for all keys, as its cached prefix is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from shared.jobs.request import Request

LEAST: Final = 256
"""Bytes of text; computing a shorter prefix again costs less than waiting."""
CUTS: Final = (2**10, 2**12, 2**14)
"""Where a first question is hashed, beside its end: the same text may be followed by another question."""
_LAST_ENDS: Final = 3
"""A conversation grows by two messages, and its last message may be rewritten."""
_EVERYBODY: Final = ""


def prefix_hashes(asked: Request, owner: str) -> tuple[str, ...]:
    """Hashes of a request's prefixes, the longest first: five at most, of 16 hex digits."""
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
    """For each place that is far enough from the start, the hash of the text before it."""
    so_far, start = hashlib.blake2b(f"{model}\0{whose}\0".encode(), digest_size=8, person=b"mlxq.mark"), 0
    for place in sorted(place for place in places if place >= LEAST):
        so_far.update(text[start:place])
        yield place, so_far.hexdigest()
        start = place
