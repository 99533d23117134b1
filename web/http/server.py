"""gunicorn's gevent worker, with limits on connections, and with errors as problem documents.

gunicorn answers requests that it cannot parse itself: they never reach Flask.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, Final

import gevent
from gevent.server import StreamServer
from gunicorn.http import errors as http_errors  # type: ignore[import-untyped]
from gunicorn.workers.ggevent import GeventWorker  # type: ignore[import-untyped]

from shared.errors import BadRequest, HeadTooLarge, Internal, MlxqError, RateLimited, Unavailable
from shared.load_settings import load_settings
from web.http.connection import Connection
from web.http.request_id import new_request_id
from web.schemas.problems import MEDIA_TYPE, ProblemDetails

log = logging.getLogger(__name__)

SPARE_CONNECTIONS: Final = 64
"""Connections beyond the limit that are accepted for as long as it takes to refuse them."""
_REFUSAL_TIMEOUT_S: Final = 1.0
_RETRY_AFTER_S: Final = 5


class Worker(GeventWorker):  # type: ignore[misc]
    """gunicorn's `worker_class`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connections: set[Connection] = set()
        self._per_address: Counter[str] = Counter()
        settings = load_settings()
        self._max_per_address = settings.max_connections_per_address

    def run(self) -> None:
        """Serve until the process is to stop."""
        hub: Any = gevent.get_hub()
        hub.print_exception = _log_exception
        self.server_class = partial(_Server, self)
        super().run()

    def close_idle_connections(self) -> None:
        """Let a graceful stop not wait for connections that have no request."""
        for connection in [*self._connections]:
            connection.close_if_idle()

    def timeout_ctx(self) -> Any:
        """The connection has its own time limits."""
        return nullcontext()

    def handle(self, listener: Any, client: socket.socket, addr: Any) -> None:
        """Serve a connection, unless there are too many."""
        address = addr[0] if addr else ""
        refusal = self._refusal(address)
        if refusal is not None:
            _refuse(client, refusal)
            return
        connection = Connection(client)
        self._connections.add(connection)
        self._per_address[address] += 1
        if not self.alive:
            connection.close_if_idle()
        try:
            super().handle(listener, connection, addr)
        finally:
            self._connections.discard(connection)
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]

    def handle_request(self, listener_name: Any, req: Any, sock: Connection, addr: Any) -> None:
        """Serve a request."""
        sock.begin_request()
        try:
            super().handle_request(listener_name, req, sock, addr)
        finally:
            sock.end_request(reusable=self.alive)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:  # noqa: ARG002
        """Respond to a request that could not be parsed, or whose handling failed outside Flask."""
        error = _error(exc)
        extra = {"client": addr[0] if addr else "", "status": error.status, "reason": str(exc)[:500]}
        if isinstance(error, Internal):
            log.error("request_failed", exc_info=exc, extra=extra)
        else:
            log.warning("request_malformed", extra=extra)
        _refuse(client.socket, error)

    def _refusal(self, address: str) -> MlxqError | None:
        if len(self._connections) >= self.worker_connections - SPARE_CONNECTIONS:
            detail = "The service has too many connections."
            return Unavailable(detail, code="too_many_connections", retry_after=_RETRY_AFTER_S)
        if self._per_address[address] >= self._max_per_address:
            detail = f"This address has {self._max_per_address} connections, which is the maximum."
            return RateLimited(detail, code="too_many_connections", retry_after=_RETRY_AFTER_S)
        return None


class _Server(StreamServer):
    """Accepts connections. When no file descriptor is left, it refuses them instead of leaving them in the backlog.

    Accepting needs a descriptor too, so one is kept in reserve.
    """

    def __init__(self, worker: Worker, listener: Any, *, spawn: Any, **_: Any) -> None:
        super().__init__(listener, handle=partial(worker.handle, listener), spawn=spawn)
        self.max_accept = 1 if worker.cfg.workers > 1 else 100
        self._reserve = [_open_reserve()]

    def do_read(self) -> Any:
        """Accept a connection; None if there is none, or if it was refused."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._reserve:
                raise
        self._reserve.pop().close()
        try:
            accepted = super().do_read()
            if accepted is not None:
                _shed(accepted[0])
        finally:
            with suppress(OSError):
                self._reserve.append(_open_reserve())


def _open_reserve() -> IO[bytes]:
    return Path(os.devnull).open("rb")


def _shed(client: Any) -> None:
    """Refuse a connection without waiting for its client."""
    log.warning("file_descriptors_exhausted")
    error = Unavailable("No file descriptor is left.", code="too_many_connections", retry_after=_RETRY_AFTER_S)
    with suppress(OSError):
        client.settimeout(0)
        client.send(_response(error))
        client.recv(2**16)  # closing a socket with unread data would discard the response
    client.close()


def _refuse(client: Any, error: MlxqError) -> None:
    """Respond with an error, and read on for a moment: closing a socket with unread data would discard the response."""
    with suppress(OSError), gevent.Timeout(_REFUSAL_TIMEOUT_S, TimeoutError()):
        client.settimeout(_REFUSAL_TIMEOUT_S)
        client.sendall(_response(error))
        client.shutdown(socket.SHUT_WR)
        while client.recv(2**16):
            pass
    client.close()


def _response(error: MlxqError) -> bytes:
    request_id = new_request_id()
    body = ProblemDetails.of(error, request_id).model_dump_json(exclude_none=True).encode()
    headers = {
        "Content-Type": MEDIA_TYPE,
        "Content-Length": str(len(body)),
        "Connection": "close",
        "X-Request-ID": request_id,
    }
    if error.retry_after is not None:
        headers["Retry-After"] = str(round(error.retry_after))
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *map(": ".join, headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _error(exc: BaseException) -> MlxqError:
    """Return what to respond to an exception that gunicorn reports."""
    if isinstance(exc, MlxqError):
        return exc
    if isinstance(exc, http_errors.LimitRequestLine | http_errors.LimitRequestHeaders):
        return HeadTooLarge("The request line or a header is too long, or there are too many headers.")
    ours = (http_errors.InvalidResponseHeader, http_errors.InvalidResponseHeaderName)
    if isinstance(exc, http_errors.ParseException) and not isinstance(exc, ours):
        return BadRequest("The request is not valid HTTP.")
    return Internal("An internal error occurred. Its cause is in the log, under this request_id.")


def _log_exception(context: Any, kind: Any, value: Any, trace: Any) -> None:
    """Log what gevent would print."""
    log.error("greenlet_failed", exc_info=(kind, value, trace), extra={"context": repr(context)[:500]})
