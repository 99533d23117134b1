"""Jobs that are left to others: their workers are told at once, and everybody when it is time."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from kombu.exceptions import OperationalError
from redis import ConnectionError as RedisAway

from shared.queue.claims import Left
from worker.queue.left import Caller

JOBS = (Left("job_1", "node-1", 0.1), Left("job_2", "node-2", 0.02))


class Office:
    """Takes note of tickets; it may be closed."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.reminded: list[str] = []
        self.away: Exception | None = None

    def send(self, model: str, job_id: str, node: str) -> None:
        if self.away:
            raise self.away
        assert model == "m"
        self.told.append((job_id, node))

    def remind(self, model: str, job_id: str) -> None:
        if isinstance(self.away, RedisAway):
            raise self.away
        assert model == "m"
        self.reminded.append(job_id)


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.fixture
def caller(office: Office) -> Caller:
    return Caller(office)  # type: ignore[arg-type]  # a stand-in


def test_their_workers_are_told_and_later_everybody(
    caller: Caller, office: Office, eventually: Callable[..., None]
) -> None:
    caller.call("m", JOBS)
    assert office.told == [("job_1", "node-1"), ("job_2", "node-2")]
    eventually(lambda: len(office.reminded) == 2)
    assert office.reminded == ["job_2", "job_1"], "each when it is anybody's"


def test_everybody_is_told_though_their_workers_cannot_be(
    caller: Caller, office: Office, eventually: Callable[..., None]
) -> None:
    office.away = OperationalError("away")
    caller.call("m", JOBS)
    eventually(lambda: len(office.reminded) == 2)


def test_what_cannot_be_sent_is_left_to_the_rescue(
    caller: Caller, office: Office, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    office.away = RedisAway("away")
    with caplog.at_level(logging.WARNING):
        caller.call("m", JOBS[:1])
        eventually(lambda: len(caplog.records) == 2)
    assert all(record.getMessage().startswith("no ticket sent") for record in caplog.records)
