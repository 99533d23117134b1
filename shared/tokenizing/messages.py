"""What tokenizer helpers and their clients say to each other: frames over a socket, and the words in them.

A frame is the lengths of its two parts, a header (a JSON object) and a payload (bytes, in answers the token ids as
unsigned 32-bit integers of this machine). A client sends one request and reads one answer; a helper that is closed or
killed is end of file.

Request header: `op` (`tokenize`, or what a worker's helper knows besides), `limit_s` (the helper ends itself that late,
whatever becomes of its client), and the operation's own fields. Answer header: `error` and `message`, or what the
operation gives.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from shared.jobs.request import Request

_LENGTHS: Final = struct.Struct(">II")
_MOST_HEADER: Final = 256 * 2**20
_MOST_PAYLOAD: Final = 2**30


class TokenizerFault(StrEnum):
    """Answers of a helper that are no fault of the prompt."""

    CORRUPT = "corrupt"
    """The tokenizer's file is not the one that was asked for."""
    UNUSABLE = "unusable"
    """The tokenizer cannot be loaded."""


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a model's tokenizer is, and how its prompts are made.

    Attributes:
        path: a `tokenizer.json`, perhaps with gzip (`.gz`); or the model's folder, which only a worker's helper reads.
        digest: what `digest` gives for the file's text, compared when it is loaded; empty: not compared.
        chat_template: the Jinja template for messages; None when there is none. A folder brings its own.
        bos_token: a prompt that begins with it gets no second one.
        variables: what the template finds beside the messages.
        defaults: of a folder: what mlx-lm's model says of tokenizers that do not say it themselves.
        vision: of a folder: whether its template is looked for as mlx-vlm does.
    """

    path: str
    digest: str = ""
    chat_template: str | None = None
    bos_token: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] | None = None
    vision: bool = False

    @classmethod
    def of_card(cls, path: str, digest: str, fields: Mapping[str, Any]) -> TokenizerSource:
        """The source that the fields of a model's card describe, with its tokenizer in a file."""
        return cls(path, digest, fields["chat_template"], fields["bos_token"], fields["template_variables"] or {})

    def to_dict(self) -> dict[str, Any]:
        """As it travels in a header."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as its model reads it.

    Attributes:
        tokens: ids, one for each image among them; never empty.
        shared: length of the prefix that only the leading system message decides; 0 unless the request shares it.
    """

    tokens: tuple[int, ...]
    shared: int = 0


def digest(text: str) -> str:
    """The name of a tokenizer: a hash of its `tokenizer.json`."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def request_fields(request: Request) -> dict[str, Any]:
    """What a helper needs of a request."""
    return {
        "prompt": request.prompt or "",
        "messages": request.messages,
        "share_system_prompt": request.share_system_prompt,
    }


def send(peer: socket.socket, header: dict[str, Any], payload: bytes = b"") -> None:
    """Send a frame. Raises OSError when the peer is gone or the socket's timeout is over."""
    text = json.dumps(header, ensure_ascii=False).encode(errors="surrogatepass")
    peer.sendall(_LENGTHS.pack(len(text), len(payload)) + text + payload)


def receive(peer: socket.socket, deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
    """Read a frame.

    Args:
        deadline: by `time.monotonic`; None: wait without end.

    Raises:
        EOFError: the peer is gone, or says what no peer of ours would.
        TimeoutError: the frame is not whole by the deadline.
    """
    header_bytes, payload_bytes = _LENGTHS.unpack(_read(peer, _LENGTHS.size, deadline))
    if header_bytes > _MOST_HEADER or payload_bytes > _MOST_PAYLOAD:
        raise EOFError("a frame of an absurd length")
    text = _read(peer, header_bytes, deadline)
    payload = _read(peer, payload_bytes, deadline)
    try:
        header = json.loads(text.decode(errors="surrogatepass"))
    except ValueError as error:
        raise EOFError("a header that is no JSON") from error
    if not isinstance(header, dict):
        raise EOFError("a header that is no object")
    return header, bytes(payload)


def _read(peer: socket.socket, size: int, deadline: float | None) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    done = 0
    while done < size:
        if deadline is not None:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            got = peer.recv_into(view[done:])
        except ConnectionError as error:
            raise EOFError("the peer is gone") from error
        if got == 0:
            raise EOFError("the peer is gone")
        done += got
    return buffer
