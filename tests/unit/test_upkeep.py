"""The round that nobody asks for: taking jobs back does not depend on sending tickets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import redis
from kombu.exceptions import OperationalError

from scripts.commands.ports import free_port
from shared.models.registry import Registry
from shared.queue.claims import Waiting
from shared.queue.redis import Redis
from shared.queue.wakeups import TicketOffice, make_app
from shared.settings import Settings
from web import upkeep
from web.upkeep import Upkeep

LOST = Waiting("m", "job_1")


class Stage:
    """A reaper and a ticket office in one; both can fail, and what is done is noted."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.redis_away = False
        self.broker_error: Exception | None = None

    def reap(self) -> list[Waiting]:
        self.done.append("reap")
        if self.redis_away:
            raise redis.ConnectionError
        return [LOST]

    def send_all(self, waiting: Sequence[Waiting]) -> None:
        self.done.append("send")
        if self.broker_error is not None:
            raise self.broker_error

    def rescue(self) -> int:
        self.done.append("rescue")
        return 0


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def kept(stage: Stage) -> Upkeep:
    return Upkeep(stage, stage)  # type: ignore[arg-type]


def test_a_round_takes_back_sends_and_rescues(stage: Stage, kept: Upkeep) -> None:
    kept.round()
    assert stage.done == ["reap", "send", "rescue"]


def test_without_redis_nothing_is_sent_and_the_next_round_is_whole(stage: Stage, kept: Upkeep) -> None:
    stage.redis_away = True
    kept.round()
    stage.redis_away = False
    kept.round()
    assert stage.done == ["reap", "reap", "send", "rescue"]


@pytest.mark.parametrize("error", [OperationalError("away"), RuntimeError("a bug")])
def test_a_broker_that_is_away_is_left_alone_for_a_while(stage: Stage, kept: Upkeep, error: Exception) -> None:
    stage.broker_error = error
    for _ in range(3):
        kept.round()
    assert stage.done == ["reap", "send", "reap", "reap"]


def test_after_a_while_the_broker_is_tried_again(stage: Stage, kept: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_PAUSE_S", 0.0)
    stage.broker_error = OperationalError("away")
    kept.round()
    stage.broker_error = None
    kept.round()
    assert stage.done == ["reap", "send", "reap", "send", "rescue"]


@contextmanager
def refusing() -> Iterator[int]:
    yield free_port()


@contextmanager
def deaf() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("broker", [refusing, deaf])
def test_who_only_sends_learns_soon_that_the_broker_is_away(client: Redis, settings: Settings, broker: object) -> None:
    with broker() as port:  # type: ignore[operator]
        away = settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{port}/0"})
        office = TicketOffice(make_app(away, hasty=True), client, Registry(client))
        for _ in range(2):
            asked_at = time.monotonic()
            with pytest.raises(OperationalError):
                office.send("m", "job_1")
            assert time.monotonic() - asked_at < 3  # a second, and what a busy test machine adds
