"""Stored responses: on disk and in Redis, their lifetimes and limits, and the work of the background process."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Unavailable
from shared.redis import keys
from tests.support.fake_redis import FakeRedis
from web.background.response_keeper import surplus
from web.responses import store as store_module
from web.responses.store import DiskResponses, Entry, RedisResponses, ResponseStore

LIFETIME_S = 100
LIMIT = 10**6


@pytest.fixture(params=["disk", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResponseStore:
    return DiskResponses(tmp_path, LIFETIME_S) if request.param == "disk" else RedisResponses(FakeRedis(), LIFETIME_S)


def test_the_two_parts_of_a_response(store: ResponseStore) -> None:
    assert store.get("key", "resp_1") is None and list(store.owners()) == []
    store.put("key", "resp_1", "request é")
    assert store.get("key", "resp_1") == ("request é", None)
    store.put_answer("key", "resp_1", "answer")
    assert store.get("key", "resp_1") == ("request é", "answer")
    assert store.get("other", "resp_1") is None
    (entry,) = store.entries("key")
    assert (entry.id, entry.bytes) == ("resp_1", len("request é".encode()) + len("answer"))
    assert abs(entry.used_at - time.time()) < 60 and list(store.owners()) == ["key"]
    store.delete("key", "resp_1")
    store.delete("key", "resp_1")
    assert store.get("key", "resp_1") is None and store.entries("key") == []


def test_a_deleted_response_does_not_come_back_with_its_answer(store: ResponseStore) -> None:
    """The background process may store the answer while the response is being deleted."""
    store.put("key", "resp_1", "request")
    store.delete("key", "resp_1")
    store.put_answer("key", "resp_1", "answer")
    assert store.get("key", "resp_1") is None
    left = [entry.id for entry in surplus(store.entries("key"), time.time() - LIFETIME_S, LIMIT)]
    assert [entry.id for entry in store.entries("key")] == left  # what is left, the next cleaning deletes


def test_use_begins_the_lifetime_of_a_file_anew(tmp_path: Path) -> None:
    store = DiskResponses(tmp_path, LIFETIME_S)
    store.put("key", "resp_1", "request")
    (path,) = (tmp_path / "key").iterdir()
    os.utime(path, (0, time.time() - LIFETIME_S + 10))
    assert store.get("key", "resp_1") is not None
    os.utime(path, (0, time.time() - LIFETIME_S))
    assert store.get("key", "resp_1") is None
    store.touch("key", ["resp_1", "resp_unknown"])
    assert store.get("key", "resp_1") is not None


def test_use_begins_the_lifetime_of_a_key_anew() -> None:
    client: Any = FakeRedis()
    store = RedisResponses(client, LIFETIME_S)
    store.put("key", "resp_1", "request")
    name = f"{keys.RESPONSE}key:resp_1"
    client.expire(name, 10)
    store.touch("key", ["resp_1", "resp_unknown"])
    assert 90 < client.ttl(name) <= LIFETIME_S
    assert [entry.id for entry in store.entries("key")] == ["resp_1"]


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(Unavailable) as refused:
        DiskResponses(tmp_path, LIFETIME_S).put("key", "resp_1", "request")
    assert refused.value.code == "disk_full" and list((tmp_path / "key").iterdir()) == []


def test_what_killed_processes_left_behind_is_deleted(tmp_path: Path) -> None:
    store = DiskResponses(tmp_path, LIFETIME_S)
    store.put("key", "resp_1", "request")
    for name, age_s in (("resp_2.request.json.aa.part", 0), ("resp_3.request.json.bb.part", 3600)):
        path = tmp_path / "key" / name
        path.touch()
        os.utime(path, (0, time.time() - age_s))
    assert [entry.id for entry in store.entries("key")] == ["resp_1"]
    assert {path.name for path in (tmp_path / "key").iterdir()} == {
        "resp_1.request.json",
        "resp_2.request.json.aa.part",
    }


@pytest.mark.parametrize(
    ("entries", "deleted"),
    [
        ([("a", 5, 1.0), ("b", 5, 2.0)], []),
        ([("a", 5, 1.0), ("b", 6, 2.0)], ["a"]),
        ([("a", 1, 0.5), ("b", 5, 2.0)], ["a"]),
        ([("a", 11, 2.0)], ["a"]),
        ([("a", 4, 1.0), ("b", 11, 2.0), ("c", 4, 3.0)], ["b"]),
    ],
)
def test_expired_responses_and_the_oldest_beyond_the_limit_are_deleted(
    entries: list[tuple[str, int, float]], deleted: list[str]
) -> None:
    assert [each.id for each in surplus([Entry(*each) for each in entries], 0.5, 10)] == deleted
