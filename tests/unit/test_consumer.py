"""A worker whose broker is away finds it again soon after it is back."""

from __future__ import annotations

import logging

import pytest
from kombu import Connection

from scripts.commands.ports import free_port
from shared.queue.wakeups import make_app
from shared.settings import Settings
from worker.queue.consumer import RECONNECT_S, TicketConsumer


class _EnoughError(Exception):
    pass


def test_a_broker_that_is_away_is_looked_for_often_and_told_of_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 20:
            raise _EnoughError

    monkeypatch.setattr("kombu.utils.functional.sleep", sleep)
    consumer = TicketConsumer.__new__(TicketConsumer)
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
