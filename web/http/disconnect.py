"""Detect that a client has closed its connection.

While a result is being generated or a stream is idle, nothing is written, so a closed connection causes no error.
Reading from the socket detects it: it returns end of file.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import gevent

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

CONNECTION: Final = "gunicorn.socket"
"""The client's `Connection` in the WSGI environment."""


@contextmanager
def watch_disconnect(environ: WSGIEnvironment, on_disconnect: Callable[[], None]) -> Iterator[None]:
    """Call `on_disconnect` if the client closes its connection inside the block.

    A client that closes only its sending half counts as disconnected: the two cases cannot be distinguished, and HTTP
    clients that wait for a response do not do that.
    """
    connection = environ.get(CONNECTION)
    if connection is None:  # another server, or Flask's test client
        yield
        return
    watcher = gevent.spawn(_watch, connection, on_disconnect)
    try:
        yield
    finally:
        # Waits until the watcher has ended: gunicorn reads the next request from the same socket.
        watcher.kill()


def _watch(connection: Any, on_disconnect: Callable[[], None]) -> None:
    try:
        # MSG_PEEK leaves a pipelined request to gunicorn. If there is one, the client is alive and the watch ends.
        closed = not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        closed = True
    if closed:
        # In a greenlet of its own: leaving the block kills this one, which must not interrupt the callback.
        gevent.spawn(on_disconnect)
