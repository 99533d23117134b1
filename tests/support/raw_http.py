"""HTTP over a plain socket, for requests that no client library sends."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class Raw:
    """A connection to a server. Close it, or use it as a context manager."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname or "", address.port or 80), timeout=30)
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> Self:
        self._socket.sendall(data)
        return self

    def finish(self) -> Self:
        """Send no more data."""
        self._socket.shutdown(socket.SHUT_WR)
        return self

    def receive_until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            data = self._socket.recv(2**16)
            assert data, f"the connection ended before {mark!r}: {self.received!r}"
            self.received += data
        return self.received

    def receive_until_end(self) -> bytes:
        with suppress(ConnectionResetError):
            while data := self._socket.recv(2**16):
                self.received += data
        return self.received

    def exchange(self, data: bytes, *, close: bool = True) -> tuple[int, dict[str, str], bytes]:
        """Send a request; return the status, the headers and the body of the response."""
        with suppress(BrokenPipeError, ConnectionResetError):  # the server has responded already
            self.send(data)
        head, _, body = self.receive_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += self._socket.recv(2**16)
        if close:
            self._socket.close()
        return int(first.split()[1]), headers, body
