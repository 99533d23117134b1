"""A connection to the broker that was lost leaves no descriptors behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import kombu
import psutil
import pytest
from kombu.exceptions import OperationalError

from shared.queue.broker import kombu_url, transport_options
from shared.queue.wakeups import wakeup_queue
from tests.support.servers import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with closing(Server(tmp_path / "broker", "secret")) as server:
        yield server


def sockets(server: Server) -> int:
    """The number of this process's sockets to the server."""
    connections = psutil.Process().net_connections("tcp")
    return sum(bool(each.raddr) and each.raddr.port == server.port for each in connections)


def consume(server: Server, *, dies: bool) -> object:
    """Receive wake-ups as a worker does, until the connection is lost; then drop the connection. Return its channel."""
    url = f"redis://:secret@127.0.0.1:{server.port}/0"
    connection = kombu.Connection(kombu_url(url), transport_options=transport_options(url, timeout_s=1))
    channel = connection.channel()
    with suppress(OperationalError, *connection.connection_errors):
        kombu.Consumer(channel, [wakeup_queue("node")], callbacks=[print], no_ack=True).consume()
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
        if dies:
            server.kill()
        connection.drain_events(timeout=0.1)
    connection.collect()
    return channel


@pytest.mark.parametrize("dies", [True, False])
def test_connections_are_closed(server: Server, *, dies: bool) -> None:
    server.client.close()
    before = sockets(server)
    channel = consume(server, dies=dies)  # Celery keeps a reference, too
    assert channel
    assert sockets(server) == before
