"""A cut link drops everything silently; after it is restored, delayed data arrives."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.chaos.network_faults import Proxy, _free_pair, find_orphans


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1000):
            self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        proxy = Proxy(server.server_address)
        yield proxy
        proxy.close()
        server.shutdown()
        thread.join()


def test_a_proxy_forwards_everything(proxy: Proxy) -> None:
    with socket.create_connection(proxy.address, timeout=5) as client:
        client.sendall(b"there")
        assert client.recv(100) == b"there"


def test_data_sent_during_a_cut_arrives_after_the_link_is_restored(proxy: Proxy) -> None:
    with socket.create_connection(proxy.address, timeout=5) as client:
        client.sendall(b"one")
        assert client.recv(100) == b"one"
        proxy.cut()
        client.sendall(b"two")
        with socket.create_connection(proxy.address, timeout=5) as other:
            other.sendall(b"three")
            for each in (client, other):
                each.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    each.recv(100)
                each.settimeout(5)
            proxy.restore()
            assert (client.recv(100), other.recv(100)) == (b"two", b"three")


def test_a_closed_connection_is_closed_on_the_other_side(proxy: Proxy, eventually: Callable[..., None]) -> None:
    before = threading.active_count()
    with socket.create_connection(proxy.address, timeout=5) as client:
        client.sendall(b"x")
        assert client.recv(100) == b"x"
    eventually(lambda: threading.active_count() <= before)


def test_an_address_in_use_is_not_chosen() -> None:
    host, guest = _free_pair(7, ())
    other, _ = _free_pair(7, {host})
    assert len({host, guest, other}) == 3
    assert _free_pair(2**15 + 7, {host}) == _free_pair(7, {host})
    assert all(each.startswith(("198.18.", "198.19.")) for each in (host, guest, other))


def test_every_number_has_its_own_network() -> None:
    assert len({_free_pair(number, ()) for number in range(2**15)}) == 2**15


def test_only_namespaces_of_ended_runs_are_orphans() -> None:
    ended_pid = psutil.pids()[-1] + 1
    while psutil.pid_exists(ended_pid):
        ended_pid += 1
    assert find_orphans([f"mq{os.getpid()}0", f"mq{ended_pid}1", "mq", "other"]) == [f"mq{ended_pid}1"]
