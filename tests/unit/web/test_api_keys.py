"""API keys: one file of hashes, with concurrent writers and readers."""

import fcntl
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from web.access.api_keys import SCOPES, KeyStore, new_key


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "data" / "keys.json")


def path_of(store: KeyStore) -> Path:
    return store._path


def test_new_keys_are_well_formed_and_unique() -> None:
    assert re.fullmatch(r"mlxq_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", new_key())
    assert len({new_key() for _ in range(100)}) == 100


def test_a_created_key_is_found_and_not_stored_in_plain_text(store: KeyStore) -> None:
    key = store.create("alice", ["infer"], "10/minute")
    found = store.find(key)
    assert found is not None
    assert (found.name, found.scopes, found.rate_limit) == ("alice", frozenset({"infer"}), "10/minute")
    assert key.split("_")[1] == found.id
    assert key[14:] not in path_of(store).read_text()
    assert path_of(store).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wrong", ["", "x", "mlxq_00000000_" + "a" * 43, "mlxq_zz", "é", "\udcff"])
def test_an_unknown_or_malformed_key_is_not_found(store: KeyStore, wrong: str) -> None:
    store.create("alice", ["infer"])
    assert store.find(wrong) is None


def test_a_known_id_with_another_secret_is_not_found(store: KeyStore) -> None:
    key = store.create("alice", ["infer"])
    assert store.find(key[:14] + new_key()[14:]) is None


def test_a_revoked_key_is_not_found_and_its_name_is_free(store: KeyStore) -> None:
    key = store.create("alice", ["infer"])
    store.revoke("alice")
    assert store.find(key) is None
    assert [entry.revoked_at is None for entry in store.list()] == [False]
    with pytest.raises(KeyError):
        store.revoke("alice")
    assert store.find(store.create("alice", ["infer"])) is not None


def test_ensure_stores_a_key_once(store: KeyStore) -> None:
    key = new_key()
    first = store.ensure(key, "local", SCOPES)
    assert store.ensure(key, "local", SCOPES) == first == store.find(key)
    assert len(store.list()) == 1
    with pytest.raises(ValueError, match="id"):
        store.ensure(key[:14] + new_key()[14:], "other", SCOPES)
    with pytest.raises(ValueError, match="mlxq_"):
        store.ensure("secret", "other", SCOPES)


def test_ensure_revokes_the_previous_key_of_the_same_name(store: KeyStore) -> None:
    old, new, others = new_key(), new_key(), store.create("alice", ["infer"])
    store.ensure(old, "local", SCOPES)
    store.ensure(new, "local", SCOPES)
    assert store.find(old) is None and store.find(new) is not None and store.find(others) is not None
    assert [entry.name for entry in store.list() if entry.revoked_at is None] == ["alice", "local"]

    store.ensure(old, "local", SCOPES)
    assert store.find(old) is None and store.find(new) is None


def test_a_refused_key_revokes_no_other(store: KeyStore) -> None:
    key, others = new_key(), store.create("alice", ["infer"])
    store.ensure(key, "local", SCOPES)
    with pytest.raises(ValueError, match="id"):
        store.ensure(others[:14] + new_key()[14:], "local", SCOPES)
    assert store.find(key) is not None


def test_invalid_scopes_limits_and_names_are_refused(store: KeyStore) -> None:
    store.create("alice", ["infer"])
    for arguments in (("bob", ["root"]), ("bob", []), ("bob", ["infer"], "often"), ("alice", ["infer"])):
        with pytest.raises(ValueError):  # noqa: PT011 -- four different messages
            store.create(*arguments)
    assert len(store.list()) == 1


def test_changes_by_another_process_take_effect(store: KeyStore) -> None:
    other = KeyStore(path_of(store))
    key = store.create("alice", ["infer"])
    assert other.find(key) is not None
    store.revoke("alice")
    assert other.find(key) is None


@pytest.mark.parametrize("content", ["", '{"keys": [', '{"keys": [{"id": "a"}]}', "[]", "\x00"])
def test_a_corrupt_file_keeps_the_known_keys_valid_and_is_not_overwritten(store: KeyStore, content: str) -> None:
    key = store.create("alice", ["infer"])
    assert store.find(key) is not None
    path_of(store).write_text(content)
    assert store.find(key) is not None
    with pytest.raises((ValueError, TypeError, KeyError)):
        store.create("bob", ["infer"])
    assert path_of(store).read_text() == content


def test_concurrent_writers_lose_no_keys(store: KeyStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda n: KeyStore(path_of(store)).create(f"key {n}", ["infer"]), range(40)))
    assert all(store.find(key) is not None for key in keys)
    assert len(json.loads(path_of(store).read_text())["keys"]) == 40


def test_waiting_for_the_lock_times_out(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.access.api_keys.LOCK_TIMEOUT_S", 0.05)
    store.create("alice", ["infer"])
    with path_of(store).with_suffix(".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="lock of the API keys"):
            store.create("bob", ["infer"])
    assert store.create("bob", ["infer"])


def test_entries_of_earlier_versions_keep_every_priority(store: KeyStore) -> None:
    key = store.create("old", ["infer"], max_priority=Priority.BATCH)
    path = path_of(store)
    content = json.loads(path.read_text())
    for name in ("max_queued", "max_priority"):
        del content["keys"][0][name]
    path.write_text(json.dumps(content))
    entry = store.find(key)
    assert entry is not None and (entry.limits, entry.max_priority) == (OwnerLimits(), Priority.HIGH)
    assert store.ensure(new_key(), "local", SCOPES).max_priority is Priority.HIGH
