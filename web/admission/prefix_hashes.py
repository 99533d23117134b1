"""Prefix hashes of a request. A claim uses them to find the worker whose prefix cache has a prefix of the job.

A hash covers the text of a prefix and the API key, so it does not reveal the text and differs between keys. The one
exception is the hash of a shared system message: like its cached prefix, it is the same for all keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from shared.jobs.request import Request

MIN_BYTES: Final = 256
"""Shortest text that is hashed. Computing a shorter prefix again costs less than waiting for the worker that has it."""
OFFSETS: Final = (2**10, 2**12, 2**14)
"""Byte offsets at which the first user message is hashed, in addition to its end. It may consist of a document and a
question, and the next request may have the same document with another question."""
_LAST_MESSAGES: Final = 3
"""Number of messages at whose end a conversation is hashed. Each turn adds two messages, and the last one may be
edited."""
_ALL_KEYS: Final = ""


def prefix_hashes(request: Request, owner: str) -> tuple[str, ...]:
    """Return hashes of a request's prefixes, the longest first: at most five, of 16 hex digits each."""
    texts = _texts(request)
    text, ends = b"".join(texts), [*accumulate(map(len, texts))]
    lengths = {ends[0], *ends[-_LAST_MESSAGES:]}
    if len(ends) <= 2:
        lengths.update(offset for offset in OFFSETS if offset < ends[-1])
    shared = {ends[0]} if request.share_system_prompt else set()
    hashes = dict(_hashes(request.model, owner, text, lengths - shared))
    hashes.update(_hashes(request.model, _ALL_KEYS, text, shared))
    return tuple(hashes[length] for length in sorted(hashes, reverse=True))


def _texts(request: Request) -> list[bytes]:
    messages = request.messages
    if messages is None:
        if request.raw:
            return [(request.prompt or "").encode(errors="replace")]
        messages = ({"role": "user", "content": request.prompt},)
    return [f"{message['role']}\n{message['content']}\n".encode(errors="replace") for message in messages]


def _hashes(model: str, owner: str, text: bytes, lengths: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield each prefix length of at least `MIN_BYTES` with the hash of that prefix."""
    state, start = hashlib.blake2b(f"{model}\0{owner}\0".encode(), digest_size=8, person=b"mlxq.mark"), 0
    for length in sorted(length for length in lengths if length >= MIN_BYTES):
        state.update(text[start:length])
        yield length, state.hexdigest()
        start = length
