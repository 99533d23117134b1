"""API keys: one file of hashes, several writers, and readers that never see half of it."""

import fcntl
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from web.access.api_keys import SCOPES, KeyStore, new_key


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "data" / "keys.json")


def path_of(store: KeyStore) -> Path:
    return store._path


def test_a_key_has_its_form_and_is_never_the_same_twice() -> None:
    assert re.fullmatch(r"mlxq_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", new_key())
    assert len({new_key() for _ in range(100)}) == 100


def test_a_made_key_is_found_and_the_file_does_not_hold_it(store: KeyStore) -> None:
    key = store.create("alice", ["infer"], "10/minute")
    found = store.find(key)
    assert found is not None
    assert (found.name, found.scopes, found.rate_limit) == ("alice", frozenset({"infer"}), "10/minute")
    assert key.split("_")[1] == found.id
    assert key[14:] not in path_of(store).read_text()
    assert path_of(store).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wrong", ["", "x", "mlxq_00000000_" + "a" * 43, "mlxq_zz", "é", "\udcff"])
def test_what_is_no_key_of_ours_finds_nothing(store: KeyStore, wrong: str) -> None:
    store.create("alice", ["infer"])
    assert store.find(wrong) is None


def test_a_known_id_with_another_secret_finds_nothing(store: KeyStore) -> None:
    key = store.create("alice", ["infer"])
    assert store.find(key[:14] + new_key()[14:]) is None


def test_a_revoked_key_opens_nothing_and_frees_its_name(store: KeyStore) -> None:
    key = store.create("alice", ["infer"])
    store.revoke("alice")
    assert store.find(key) is None
    assert [entry.revoked_at is None for entry in store.list()] == [False]
    with pytest.raises(KeyError):
        store.revoke("alice")
    assert store.find(store.create("alice", ["infer"])) is not None


def test_ensure_makes_a_key_known_once(store: KeyStore) -> None:
    key = new_key()
    first = store.ensure(key, "local", SCOPES)
    assert store.ensure(key, "local", SCOPES) == first == store.find(key)
    assert len(store.list()) == 1
    with pytest.raises(ValueError, match="id"):
        store.ensure(key[:14] + new_key()[14:], "other", SCOPES)
    with pytest.raises(ValueError, match="mlxq_"):
        store.ensure("secret", "other", SCOPES)


def test_a_key_that_is_replaced_is_valid_no_more(store: KeyStore) -> None:
    old, new, others = new_key(), new_key(), store.create("alice", ["infer"])
    store.ensure(old, "local", SCOPES)
    store.ensure(new, "local", SCOPES)
    assert store.find(old) is None and store.find(new) is not None and store.find(others) is not None
    assert [entry.name for entry in store.list() if entry.revoked_at is None] == ["alice", "local"]

    store.ensure(old, "local", SCOPES)
    assert store.find(old) is None and store.find(new) is None


def test_a_key_that_is_refused_revokes_none(store: KeyStore) -> None:
    key, others = new_key(), store.create("alice", ["infer"])
    store.ensure(key, "local", SCOPES)
    with pytest.raises(ValueError, match="id"):
        store.ensure(others[:14] + new_key()[14:], "local", SCOPES)
    assert store.find(key) is not None


def test_bad_scopes_limits_and_names_are_refused(store: KeyStore) -> None:
    store.create("alice", ["infer"])
    for arguments in (("bob", ["root"]), ("bob", []), ("bob", ["infer"], "often"), ("alice", ["infer"])):
        with pytest.raises(ValueError):  # noqa: PT011 -- four messages, one kind
            store.create(*arguments)
    assert len(store.list()) == 1


def test_another_processs_changes_are_seen(store: KeyStore) -> None:
    other = KeyStore(path_of(store))
    key = store.create("alice", ["infer"])
    assert other.find(key) is not None
    store.revoke("alice")
    assert other.find(key) is None


@pytest.mark.parametrize("content", ["", '{"keys": [', '{"keys": [{"id": "a"}]}', "[]", "\x00"])
def test_a_broken_file_keeps_what_was_known_and_stops_writers(store: KeyStore, content: str) -> None:
    key = store.create("alice", ["infer"])
    assert store.find(key) is not None
    path_of(store).write_text(content)
    assert store.find(key) is not None
    with pytest.raises((ValueError, TypeError, KeyError)):
        store.create("bob", ["infer"])
    assert path_of(store).read_text() == content


def test_writers_at_the_same_time_lose_nothing(store: KeyStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda n: KeyStore(path_of(store)).create(f"key {n}", ["infer"]), range(40)))
    assert all(store.find(key) is not None for key in keys)
    assert len(json.loads(path_of(store).read_text())["keys"]) == 40


def test_a_writer_that_never_ends_holds_nobody_up_for_ever(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.access.api_keys.LOCK_S", 0.05)
    store.create("alice", ["infer"])
    with path_of(store).with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="lock of the API keys"):
            store.create("bob", ["infer"])
    assert store.create("bob", ["infer"])
