"""Prefix hashes of a request. A claim uses them to find the worker whose prefix cache has a prefix of the job.

A hash covers the text of a prefix, the adapter and the API key, so it does not reveal the text and differs between
keys. The one exception is the hash of a shared system message: like its cached prefix, it is the same for all keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final

from shared.jobs.request import Request, pack_tokens

MIN_BYTES: Final = 256
"""Shortest text that is hashed. Computing a shorter prefix again costs less than waiting for the worker that has it."""
OFFSETS: Final = (2**10, 2**12, 2**14)
"""Byte offsets at which the first user message is hashed, in addition to its end. It may consist of a document and a
question, and the next request may have the same document with another question."""
_LAST_MESSAGES: Final = 3
"""Number of messages at whose end a conversation is hashed. Each turn adds two messages, and the last one may be
edited."""
_ALL_KEYS: Final = ""


def prefix_hashes(request: Request, owner: str, tokens: Sequence[int] = ()) -> tuple[str, ...]:
    """Return hashes of a request's prefixes, the longest first: at most five, of 16 hex digits each.

    Args:
        tokens: the prompt's token ids, if the request has neither a prompt nor messages.
    """
    texts = _texts(request) or [pack_tokens(tokens).encode()]
    text, ends = b"".join(texts), [*accumulate(map(len, texts))]
    lengths = {ends[0], *ends[-_LAST_MESSAGES:]}
    if len(ends) <= 2:
        lengths.update(offset for offset in OFFSETS if offset < ends[-1])
    shared = {ends[0]} if request.share_system_prompt else set()
    model = request.model if request.adapter is None else f"{request.model}:{request.adapter}"
    hashes = dict(_hashes(model, owner, text, lengths - shared))
    hashes.update(_hashes(model, _ALL_KEYS, text, shared))
    return tuple(hashes[length] for length in sorted(hashes, reverse=True))


def adapter_hash(request: Request) -> tuple[str, ...]:
    """Return a hash of the adapter, by which claims find a worker that has it in memory; nothing without an adapter.

    It comes after the hashes of prefixes, because computing a prefix again takes longer than loading an adapter.
    """
    if request.adapter is None:
        return ()
    name = f"{request.model}:{request.adapter}".encode()
    return (hashlib.blake2b(name, digest_size=8, person=b"mlxq.adapter").hexdigest(),)


def _texts(request: Request) -> list[bytes]:
    messages = request.messages
    if messages is None:
        if request.prompt is None:
            return []
        if request.raw:
            return [request.prompt.encode(errors="replace")]
        messages = ({"role": "user", "content": request.prompt},)
    texts = [_message_text(message) for message in messages]
    if request.tools or request.template_variables:  # templates write them before the messages
        texts[0] = f"{request.tools}\n{request.template_variables}\n{texts[0]}"
    return [text.encode(errors="replace") for text in texts]


def _message_text(message: Mapping[str, Any]) -> str:
    """Return everything in a message that a template may write into the prompt."""
    others = "".join(
        f"{name}: {value}\n" for name, value in message.items() if name not in ("role", "content") and value is not None
    )
    return f"{message['role']}\n{message['content']}\n{others}"


def _hashes(model: str, owner: str, text: bytes, lengths: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield each prefix length of at least `MIN_BYTES` with the hash of that prefix."""
    state, start = hashlib.blake2b(f"{model}\0{owner}\0".encode(), digest_size=8, person=b"mlxq.mark"), 0
    for length in sorted(length for length in lengths if length >= MIN_BYTES):
        state.update(text[start:length])
        yield length, state.hexdigest()
        start = length
