"""HTTP as a client that must cost next to nothing speaks it: requests made beforehand, answers searched, not parsed."""

from __future__ import annotations

import json
import socket
from typing import Any

RECEIVE = 2**18


def request(path: str, key: str, body: dict[str, Any]) -> bytes:
    """A POST as bytes."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nX-API-Key: {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def connect(port: int) -> socket.socket:
    """A connection to the API of this machine."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def check_status(answer: bytes, *wanted: int) -> None:
    """Refuse another status than one of these.

    Raises:
        RuntimeError: with the beginning of the answer.
    """
    if int(answer[9:12]) not in wanted:
        raise RuntimeError(answer[:2000].decode(errors="replace"))
