"""Tokenizer files on disk and in Redis."""

from __future__ import annotations

import gzip
import os
import threading
from pathlib import Path

import pytest

from shared.models.registry import ModelCard, Registry
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.tokenizing.files import TokenizerFiles, TokenizerStore
from tests.support.fake_redis import FakeRedis

CONTENT = gzip.compress(b"{}")


@pytest.fixture(params=["fake", "valkey"])
def bytes_client(request: pytest.FixtureRequest) -> Redis:
    """An empty Redis, with a client that returns bytes."""
    if request.param == "fake":
        return FakeRedis(decode_responses=False)
    request.getfixturevalue("valkey_client")
    return connect(f"unix://{request.getfixturevalue('valkey').unix_socket_path}", decode_responses=False)


def test_file_is_fetched_once_and_is_private(tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch(digest: str) -> bytes:
        fetched.append(digest)
        return CONTENT

    files = TokenizerFiles(tmp_path / "data" / "tokenizers", fetch)
    threads = [threading.Thread(target=files.path, args=["a"]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = files.path("a")
    assert path is not None and path.read_bytes() == CONTENT and fetched == ["a"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["a.json.gz"]
    files.discard("a")
    assert files.path("a") == path and fetched == ["a", "a"]


def test_folder_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir(mode=0o755)
    TokenizerFiles(tmp_path / "t").put("a", "{}")
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o700


def test_missing_tokenizer_has_no_file(tmp_path: Path) -> None:
    assert TokenizerFiles(tmp_path / "t").path("a") is None
    assert not (tmp_path / "t").exists()


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TokenizerFiles(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.put("a", "{}")
    assert not list(tmp_path.iterdir())


def test_oldest_files_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.tokenizing.files._MAX_FILES", 3)
    files = TokenizerFiles(tmp_path)
    for n in range(5):
        os.utime(files.put(f"{n}", "{}"), (n, n))
    files.put("last", "{}")
    assert sorted(file.name[:-8] for file in tmp_path.iterdir()) == ["3", "4", "last"]


def test_redis_keeps_a_tokenizer_while_a_card_names_it(bytes_client: Redis) -> None:
    store, registry = TokenizerStore(bytes_client), Registry(bytes_client)
    assert registry.announce_model(ModelCard("m", "text", 1, tokenizer="a"))  # Redis lacks it
    store.put("a", CONTENT)
    assert not registry.announce_model(ModelCard("m", "text", 1, tokenizer="a"))
    assert not registry.announce_model(ModelCard("n", "text", 1))
    assert store.get("a") == CONTENT
    registry.announce_model(ModelCard("n", "text", 1, tokenizer="a"))
    registry.announce_model(ModelCard("m", "text", 1, tokenizer="b"))
    assert store.get("a") == CONTENT  # model `n` names it
    bytes_client.set("mlxq:tokenizer:a", "key of an earlier version")
    registry.announce_model(ModelCard("n", "text", 1))
    assert store.get("a") is None
    assert [key.decode() for key in bytes_client.keys("mlxq:*")] == [keys.MODELS]
