"""A client cannot hold a connection for ever: every read and write has a time limit."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from shared.errors import RequestTimeout
from web.http import connection
from web.http.connection import Connection

SHORT_S = 0.05


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, client = socket.socketpair()
    with ours, client:
        yield Connection(ours), client


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEEPALIVE_S", "HEAD_TIMEOUT_S", "BODY_GRACE_S", "SEND_TIMEOUT_S"):
        monkeypatch.setattr(connection, name, SHORT_S)


def test_an_idle_connection_ends_like_one_that_the_client_closed(pair: tuple[Connection, socket.socket]) -> None:
    assert pair[0].recv(10) == b""


def test_a_slow_head_is_refused(pair: tuple[Connection, socket.socket]) -> None:
    served, client = pair
    client.sendall(b"GET")
    assert served.recv(10) == b"GET"
    with pytest.raises(RequestTimeout, match="head"):
        served.recv(10)


def test_a_slow_body_is_refused_and_a_fast_one_gets_more_time(
    pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, client = pair
    served.begin_request()
    with pytest.raises(RequestTimeout, match="body"):
        served.recv(10)
    monkeypatch.setattr(connection, "MIN_BODY_RATE", 1)
    served.begin_request()
    client.sendall(b"ab")  # adds two seconds
    assert served.recv(10) == b"ab"
    assert served._deadline - time.monotonic() > 1


def test_a_client_that_reads_nothing_counts_as_gone(pair: tuple[Connection, socket.socket]) -> None:
    with pytest.raises(BrokenPipeError):
        pair[0].sendall(b"x" * 10_000_000)


def test_a_connection_that_is_closed_when_idle_still_delivers_a_request_that_has_arrived(
    pair: tuple[Connection, socket.socket],
) -> None:
    served, client = pair
    client.sendall(b"GET")
    served.close_if_idle()
    assert (served.recv(10), served.recv(10)) == (b"GET", b"")


def test_a_connection_with_a_request_is_not_closed_as_idle(pair: tuple[Connection, socket.socket]) -> None:
    served, client = pair
    served.begin_request()
    served.close_if_idle()
    client.sendall(b"body")
    assert served.recv(10) == b"body"
    served.end_request(reusable=False)
    assert served.recv(10) == b""
