"""What an error of Redis means: wait, or a fault of ours."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from threading import Thread

import pytest
from kombu.exceptions import OperationalError
from redis import ConnectionError as RedisAway
from redis import DataError, RedisError, ResponseError
from redis import TimeoutError as NoAnswer

from scripts.stack.ports import free_port
from shared.queue.redis import Redis, connect, passes
from shared.queue.wakeups import make_app
from shared.settings import Settings


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (RedisAway("refused"), True),
        (NoAnswer("no answer"), True),
        (ResponseError("BUSY Redis is busy running a script."), True),
        (ResponseError("MISCONF Errors writing to the AOF file"), True),
        (ResponseError("BUSYGROUP Consumer Group name already exists"), False),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (DataError("Invalid input of type: 'NoneType'"), False),
    ],
)
def test_only_what_time_heals_passes(error: RedisError, passing: bool) -> None:
    assert passes(error) is passing


def test_a_script_that_raises_does_not_pass(client: Redis) -> None:
    with pytest.raises(ResponseError) as caught:
        client.eval("local job = nil; return job.status", 0)
    assert not passes(caught.value)


@pytest.mark.parametrize(
    ("setting", "refusing", "usual"),
    [("maxmemory", "1", "0"), ("min-replicas-to-write", "1", "0")],
)
def test_a_server_that_takes_no_writes_now_will_later(
    valkey_client: Redis, setting: str, refusing: str, usual: str
) -> None:
    valkey_client.config_set(setting, refusing)
    try:
        for write in (
            lambda: valkey_client.set("key", "value"),
            lambda: valkey_client.eval("return redis.call('SET', 'key', 'value')", 0),
        ):
            with pytest.raises(RedisError) as caught:
                write()
            assert passes(caught.value)
    finally:
        valkey_client.config_set(setting, usual)


def test_an_outage_leaves_no_connections_behind() -> None:
    with connect(f"sentinel://127.0.0.1:{free_port()}?master=m", timeout_s=1, retries=0, connections=4) as client:
        for _ in range(20):
            with pytest.raises(RedisAway):
                client.ping()
        assert len(client.connection_pool._connections) <= 4


class Dying:
    """Sentinels that hang up on whoever asks, and count them."""

    def __init__(self) -> None:
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self.asked = [0, 0, 0]
        self._threads = [Thread(target=self._hang_up, args=(i,)) for i in range(3)]
        for thread in self._threads:
            thread.start()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners)
        return f"sentinel://{hosts}?master=m"

    def _hang_up(self, i: int) -> None:
        while True:
            try:
                connection, _ = self._listeners[i].accept()
            except OSError:  # closed
                return
            self.asked[i] += 1
            connection.close()

    def close(self) -> None:
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def dying() -> Iterator[Dying]:
    dying = Dying()
    yield dying
    dying.close()


def test_a_call_asks_each_sentinel_once(dying: Dying) -> None:
    with connect(dying.url, retries=0) as client, pytest.raises(RedisAway):
        client.ping()
    assert dying.asked == [1, 1, 1]


def test_a_ticket_asks_each_sentinel_once(dying: Dying) -> None:
    with make_app(Settings(broker_url=dying.url), hasty=True) as app, pytest.raises(OperationalError):
        app.send_task("any", retry=False)
    assert dying.asked == [1, 1, 1]
