"""Connections to Redis: transient and permanent errors, bounded pools, and Sentinel."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from threading import Thread

import pytest
from kombu.exceptions import OperationalError
from redis import ConnectionError as RedisConnectionError
from redis import DataError, RedisError, ResponseError
from redis import TimeoutError as RedisTimeoutError

from scripts.stack.ports import free_port
from shared.queue.wakeups import make_app
from shared.redis.client import Redis, connect, passes
from shared.settings import Settings


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (RedisConnectionError("refused"), True),
        (RedisTimeoutError("timed out"), True),
        (ResponseError("BUSY Redis is busy running a script."), True),
        (ResponseError("MISCONF Errors writing to the AOF file"), True),
        (ResponseError("BUSYGROUP Consumer Group name already exists"), False),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (DataError("Invalid input of type: 'NoneType'"), False),
    ],
)
def test_transient_errors_are_recognised(error: RedisError, transient: bool) -> None:
    assert passes(error) is transient


def test_error_in_a_script_is_not_transient(client: Redis) -> None:
    with pytest.raises(ResponseError) as caught:
        client.eval("local job = nil; return job.status", 0)
    assert not passes(caught.value)


@pytest.mark.parametrize(
    ("setting", "rejecting", "default"),
    [("maxmemory", "1", "0"), ("min-replicas-to-write", "1", "0")],
)
def test_rejected_write_is_transient(valkey_client: Redis, setting: str, rejecting: str, default: str) -> None:
    valkey_client.config_set(setting, rejecting)
    try:
        for write in (
            lambda: valkey_client.set("key", "value"),
            lambda: valkey_client.eval("return redis.call('SET', 'key', 'value')", 0),
        ):
            with pytest.raises(RedisError) as caught:
                write()
            assert passes(caught.value)
    finally:
        valkey_client.config_set(setting, default)


def test_outage_does_not_accumulate_connections() -> None:
    with connect(f"sentinel://127.0.0.1:{free_port()}?master=m", timeout_s=1, retries=0, connections=4) as client:
        for _ in range(20):
            with pytest.raises(RedisConnectionError):
                client.ping()
        assert len(client.connection_pool._connections) <= 4


class ClosingSentinels:
    """Three sentinels that close each connection at once and count them."""

    def __init__(self) -> None:
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self.connections = [0, 0, 0]
        self._threads = [Thread(target=self._serve, args=(i,)) for i in range(3)]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners)
        return f"sentinel://{hosts}?master=m"

    def _serve(self, i: int) -> None:
        while True:
            try:
                connection, _ = self._listeners[i].accept()
            except OSError:  # closed
                return
            self.connections[i] += 1
            connection.close()

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def sentinels() -> Iterator[ClosingSentinels]:
    sentinels = ClosingSentinels()
    yield sentinels
    sentinels.close()


def test_call_asks_each_sentinel_once(sentinels: ClosingSentinels) -> None:
    with connect(sentinels.url, retries=0) as client, pytest.raises(RedisConnectionError):
        client.ping()
    assert sentinels.connections == [1, 1, 1]


def test_wake_up_asks_each_sentinel_once(sentinels: ClosingSentinels) -> None:
    with make_app(Settings(broker_url=sentinels.url), hasty=True) as app, pytest.raises(OperationalError):
        app.send_task("any", retry=False)
    assert sentinels.connections == [1, 1, 1]
