"""Whether the client is still there.

An answer that takes long, or a stream that is idle, writes nothing and so learns nothing of a client that went
away. The socket knows at once: reading from it ends.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


@contextmanager
def watching(environ: WSGIEnvironment, gone: Callable[[], None]) -> Iterator[None]:
    """Call `gone` when the client closes its connection inside the block.

    A client that only closes its sending half counts as gone: nothing tells the two apart, and HTTP clients that
    wait for an answer do not do that.
    """
    connection = environ.get("gunicorn.socket")
    if connection is None:  # another server, or a test's client
        yield
        return
    watcher = gevent.spawn(_watch, connection, gone)
    try:
        yield
    finally:
        # Until it is dead: gunicorn reads the next request from the same socket.
        watcher.kill()


def _watch(connection: Any, gone: Callable[[], None]) -> None:
    try:
        # Peeking leaves a request that was sent ahead to gunicorn. There the watch ends: the client is alive.
        ended = not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        ended = True
    if ended:
        # Apart, because the end of the block kills this greenlet and must not cut `gone` short.
        gevent.spawn(gone)
