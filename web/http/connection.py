"""A client's connection, with time limits on everything that a client can delay."""

from __future__ import annotations

import errno
import socket
import time
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Final

from shared.errors import RequestTimeout

KEEPALIVE_S: Final = 120.0
"""How long an idle connection stays open. Proxies and clients reuse connections for up to 60 or 75 s; whichever side
has the shorter limit must be the one that sends requests, or a request can meet a connection that is being closed."""
HEAD_TIMEOUT_S: Final = 30.0
"""Time limit for a request's head, from its first byte on."""
BODY_GRACE_S: Final = 30.0
"""Time limit for a request's body, to which every `MIN_BODY_RATE` bytes that arrive add a second."""
MIN_BODY_RATE: Final = 32 * 2**10
SEND_TIMEOUT_S: Final = 60.0
"""How long a client may accept no data before its connection is closed."""


class _Phase(Enum):
    IDLE = auto()
    HEAD = auto()
    BODY = auto()


class Connection:
    """A socket whose reads and writes end in time. Everything else is passed on to the socket."""

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self._phase = _Phase.IDLE
        self._deadline = time.monotonic() + KEEPALIVE_S

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def begin_request(self) -> None:
        """A head has been read, and its request is served now."""
        self._enter(_Phase.BODY, BODY_GRACE_S)

    def end_request(self, *, reusable: bool) -> None:
        """A request has been served. If the connection is not reusable, only data that has arrived is read."""
        self._enter(_Phase.IDLE, KEEPALIVE_S)
        if not reusable:
            self.close_if_idle()

    def close_if_idle(self) -> None:
        """Read no further requests, except one that has already arrived."""
        if self._phase is _Phase.IDLE:
            self._shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        """End the connection in the middle of a response."""
        self._shutdown(socket.SHUT_RDWR)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive data; `b""` if the connection has ended or stays idle.

        Raises:
            RequestTimeout: the request's head or body arrives too slowly.
        """
        if flags:  # `watch_disconnect` looks at the socket during a response, without reading
            self.socket.settimeout(None)
            return self.socket.recv(size, flags)
        self.socket.settimeout(max(self._deadline - time.monotonic(), 0.001))
        try:
            data = self.socket.recv(size)
        except TimeoutError:
            return self._timed_out()
        except OSError:  # the client has reset the connection, or gevent interrupts the wait because of `_shutdown`
            data = self._arrived(size)
        if self._phase is _Phase.IDLE and data:
            self._enter(_Phase.HEAD, HEAD_TIMEOUT_S)
        elif self._phase is _Phase.BODY:
            self._deadline += len(data) / MIN_BODY_RATE
        return data

    def sendall(self, data: bytes) -> None:
        """Send all data.

        Raises:
            BrokenPipeError: the connection has ended, or the client has accepted no data for `SEND_TIMEOUT_S`.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[self.send(rest) :]

    def send(self, data: bytes | memoryview) -> int:
        """Send some of the data, like `sendall`."""
        self.socket.settimeout(SEND_TIMEOUT_S)
        try:
            return self.socket.send(data)
        except TimeoutError:
            raise BrokenPipeError(errno.EPIPE, "the client accepts no data") from None
        except OSError as error:
            raise BrokenPipeError(errno.EPIPE, str(error)) from None

    def _enter(self, phase: _Phase, timeout_s: float) -> None:
        self._phase = phase
        self._deadline = time.monotonic() + timeout_s

    def _arrived(self, size: int) -> bytes:
        """Return data that has arrived, without waiting."""
        self.socket.settimeout(0)
        with suppress(OSError):
            return self.socket.recv(size)
        return b""

    def _timed_out(self) -> bytes:
        if self._phase is _Phase.IDLE:
            return b""
        part = self._phase.name.lower()
        raise RequestTimeout(f"The request's {part} did not arrive in time.")

    def _shutdown(self, how: int) -> None:
        with suppress(OSError):  # the client has closed it
            self.socket.shutdown(how)
