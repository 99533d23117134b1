"""The protocol between tokenizer helpers and their clients: frames over a socket.

A frame consists of two lengths, a header (a JSON object) and a payload. The client sends one request and reads one
reply. When the helper ends, the client reads the end of the stream.

Request header: `op` (`load`, `tokenize`, `inputs`; more in a worker's helper), `limit_s` (the helper's own time limit,
in case its client has died) and the fields of the operation. Reply header: `error` and `message`, or the operation's
result. The payload of a reply to `tokenize` or `inputs` holds the token ids as unsigned 32-bit integers in native byte
order.
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
from shared.tokenizing import generic_tools

_LENGTHS: Final = struct.Struct(">II")
_MAX_HEADER_BYTES: Final = 256 * 2**20
_MAX_PAYLOAD_BYTES: Final = 2**30

QUERY: Final = -1
"""Stands for the query of a rerank request in place of the index of an input."""

RESERVED_VARIABLES: Final = frozenset(
    {
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"),
        *("return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs"),
        "sanitize_control_tokens",
    }
)
"""Names that cannot be template variables: other fields set them, or they are options of transformers' function."""


class TokenizerFault(StrEnum):
    """Errors of a helper that are not caused by the prompt."""

    CORRUPT = "corrupt"
    """The tokenizer's file is missing or does not match its digest."""
    UNUSABLE = "unusable"
    """The tokenizer cannot be loaded."""


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The location of a model's tokenizer, and its chat template.

    Attributes:
        path: a `tokenizer.json`, optionally gzipped (`.gz`), or a model folder, which only a worker's helper can read.
        digest: digest of the file's text (see `digest`), which is checked when it is loaded; empty for no check.
        chat_template: the Jinja template for messages; None if there is none. Ignored for a folder.
        tool_template: the template for messages with tools, if it is another one. Ignored for a folder.
        bos_token: first special token; it is not added to a prompt that begins with it.
        variables: variables of the template in addition to the messages.
        defaults: for a folder: mlx-lm's defaults for tokenizers of this model type.
        vision: for a folder: whether the template is loaded as mlx-vlm does.
        explain_tools: whether the system message explains tools (`shared.tokenizing.generic_tools`).
    """

    path: str
    digest: str = ""
    chat_template: str | None = None
    bos_token: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] | None = None
    vision: bool = False
    tool_template: str | None = None
    explain_tools: bool = False

    @classmethod
    def of_card(cls, path: str, digest: str, fields: Mapping[str, Any]) -> TokenizerSource:
        """Create the source for a tokenizer file and the fields of a `ModelCard`."""
        return cls(
            path,
            digest,
            chat_template=fields["chat_template"],
            bos_token=fields["bos_token"],
            variables=fields["template_variables"] or {},
            tool_template=fields.get("tool_template"),
            explain_tools=fields.get("tool_format") == generic_tools.FORMAT,
        )

    def to_dict(self) -> dict[str, Any]:
        """Encode for a header."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenised prompt.

    Attributes:
        tokens: token ids, with one placeholder per image; never empty.
        shared: length of the prefix that depends only on the leading system message; 0 unless the request shares it.
    """

    tokens: tuple[int, ...]
    shared: int = 0


def digest(text: str) -> str:
    """Return the name of a tokenizer: a hash of its `tokenizer.json`."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def request_fields(request: Request) -> dict[str, Any]:
    """Return the fields of a request that a helper needs."""
    return {
        "prompt": request.prompt or "",
        "messages": request.messages,
        "raw": request.raw,
        "tools": None if request.tool_choice == "none" else request.tools,
        "template_variables": request.template_variables,
        "continue_final": request.continue_final,
        "share_system_prompt": request.share_system_prompt,
    }


def send(peer: socket.socket, header: dict[str, Any], payload: bytes = b"") -> None:
    """Send a frame.

    Raises:
        OSError: the peer closed the connection, or the socket's timeout expired.
    """
    text = json.dumps(header, ensure_ascii=False).encode(errors="surrogatepass")
    peer.sendall(_LENGTHS.pack(len(text), len(payload)) + text + payload)


def receive(peer: socket.socket, deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
    """Read a frame.

    Args:
        deadline: a time of `time.monotonic`; None for no time limit.

    Raises:
        EOFError: the peer closed the connection or sent an invalid frame.
        TimeoutError: the frame is not complete by the deadline.
    """
    header_bytes, payload_bytes = _LENGTHS.unpack(_read(peer, _LENGTHS.size, deadline))
    if header_bytes > _MAX_HEADER_BYTES or payload_bytes > _MAX_PAYLOAD_BYTES:
        raise EOFError("the frame is too long")
    text = _read(peer, header_bytes, deadline)
    payload = _read(peer, payload_bytes, deadline)
    try:
        header = json.loads(text.decode(errors="surrogatepass"))
    except ValueError as error:
        raise EOFError("the header is not valid JSON") from error
    if not isinstance(header, dict):
        raise EOFError("the header is not a JSON object")
    return header, bytes(payload)


def _read(peer: socket.socket, size: int, deadline: float | None) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    received = 0
    while received < size:
        if deadline is not None:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            count = peer.recv_into(view[received:])
        except ConnectionError as error:
            raise EOFError("the peer closed the connection") from error
        if count == 0:
            raise EOFError("the peer closed the connection")
        received += count
    return buffer
