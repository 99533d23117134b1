"""Cached prefixes of API keys that were purged or have deleted jobs are erased, in memory and on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from shared.jobs.request import SHARED_PREFIXES
from shared.redis import keys
from shared.redis.client import Redis
from tests.support.fake_redis import FakeRedis
from tests.support.prefix_caches import CacheFactory, counting, fetch_all, store
from tests.support.small_models import small_model
from tests.support.waiting import eventually
from worker.runner.prefix.blocks import BLOCK, BlockChain, owner_of
from worker.runner.prefix.cache import owner_with_adapter
from worker.runner.prefix.files import SUFFIX
from worker.runner.vision.features import FeatureCache
from worker.service import prefix_eraser
from worker.service.prefix_eraser import SLACK_S, UNUSED_S, PrefixEraser

TOKENS = counting(1, 2 * BLOCK)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama")


@pytest.fixture
def caches(tmp_path: Path, model: Any) -> Iterator[CacheFactory]:
    factory = CacheFactory(tmp_path, model)
    yield factory
    factory.close()


def owners_on_disk(folder: Path) -> set[str]:
    return {owner_of(path.stem) for path in folder.rglob("*" + SUFFIX)}


def test_a_purged_owner_has_nothing_left_and_stores_nothing(caches: CacheFactory, model: Any) -> None:
    cache = caches()
    for owner in ("me", "you"):
        store(cache, model, TOKENS, owner)
    cache.share("me", TOKENS)
    cache.close(10)
    assert owners_on_disk(caches.folder) == {"me", "you", SHARED_PREFIXES}
    cache = caches()
    for owner in ("me", "you"):
        store(cache, model, TOKENS, owner)
        cache.load(owner, TOKENS)  # what is reused is about to be written
    cache.erase({"me": math.inf, SHARED_PREFIXES: time.time()})
    store(cache, model, TOKENS, "me")
    assert [cache.length(owner, TOKENS) for owner in ("me", "you", "another")] == [0, len(TOKENS), 0]
    cache.set_limit(2**30)
    cache.close(10)
    assert owners_on_disk(caches.folder) == {"you"}
    assert fetch_all(caches(), TOKENS, "me") == 0


def test_prefixes_of_adapters_are_erased_with_those_of_their_api_key(caches: CacheFactory, model: Any) -> None:
    cache, owners = caches(), [owner_with_adapter(key, "sql") for key in ("me", "you")]
    for owner in owners:
        store(cache, model, TOKENS, owner)
    cache.share(owners[0], TOKENS)
    cache.close(10)
    assert owners_on_disk(caches.folder) == {"me", "you", SHARED_PREFIXES}, "files are found by the key"
    cache = caches()
    for owner in owners:
        store(cache, model, TOKENS, owner)
    cache.erase({"me": math.inf, SHARED_PREFIXES: time.time()})
    store(cache, model, TOKENS, owners[0])
    assert [cache.length(owner, TOKENS) for owner in owners] == [0, len(TOKENS)]
    cache.close(10)
    assert owners_on_disk(caches.folder) == {"you"}


def test_only_prefixes_that_were_not_used_since_are_erased(
    caches: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half is used by a later row, too; the second half only by the deleted job's."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1000)
    cache, other = caches(), [*TOKENS[:BLOCK], *counting(7, BLOCK)]
    store(cache, model, TOKENS)
    monkeypatch.setattr(time, "time", lambda: now)
    store(cache, model, other)
    cache.erase({"me": now - 500})
    assert (cache.length("me", TOKENS), cache.length("me", other)) == (BLOCK, len(other))
    assert cache.nbytes == sum(part.nbytes for part in cache._trees._used)
    cache.erase({"me": now})
    assert cache.nbytes == 0 == cache.length("me", other)


def test_files_have_the_time_of_their_last_use_not_of_their_writing(
    caches: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1000)
    cache = caches()
    store(cache, model, TOKENS)
    monkeypatch.setattr(time, "time", lambda: now)
    cache.close(10)
    again = caches()
    again.erase({"me": now - 2000})
    assert again.fetch("you", TOKENS) is None
    assert caches.on_disk() == 2
    again.erase({"me": now - 999})
    eventually(lambda: caches.on_disk() == 0, "the files are deleted")


def test_files_of_earlier_versions_are_deleted(caches: CacheFactory) -> None:
    old = caches.folder / "model" / ("0" * 64 + SUFFIX)
    old.parent.mkdir()
    old.write_bytes(b"content")
    caches()
    assert not old.exists()


class Worker:
    """Collects the cutoffs that a model worker gets."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.cutoffs: list[Mapping[str, float]] = []

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        self.cutoffs.append(cutoffs)


class Setting:
    """An eraser with a folder of files, and a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client: Redis = FakeRedis()
        self.workers = [Worker("w1")]
        self.folder = folder
        self.now = time.time()
        monkeypatch.setattr(prefix_eraser.time, "time", lambda: self.now)
        monkeypatch.setattr(prefix_eraser, "REPEAT_S", 0.0)
        self.eraser = self.new_eraser()

    def new_eraser(self) -> PrefixEraser:
        return PrefixEraser(self.client, self.folder, lambda: self.workers)

    def write(self, owner: str, used_at: float) -> None:
        path = self.folder / "model" / (next(BlockChain.of(owner).blocks(TOKENS)).name + SUFFIX)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
        os.utime(path, (used_at, used_at))


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_prefixes_of_deleted_jobs_are_erased_once_they_are_unused(setting: Setting) -> None:
    ended_at = setting.now - 1
    setting.client.zadd(keys.PREFIX_CUTOFFS, {"a": ended_at})
    setting.write("a", ended_at - 1)
    setting.write("b", ended_at - 1)
    setting.eraser.do()
    assert owners_on_disk(setting.folder) == {"a", "b"}, "another job may still use it"
    setting.now += UNUSED_S + SLACK_S
    setting.eraser.do()
    assert owners_on_disk(setting.folder) == {"b"}
    before = len(setting.workers[0].cutoffs)
    setting.now += UNUSED_S
    setting.eraser.do()
    assert len(setting.workers[0].cutoffs) == before, "nothing can be left"
    setting.client.zadd(keys.PREFIX_CUTOFFS, {"a": setting.now})
    setting.now += 1
    setting.eraser.do()
    assert len(setting.workers[0].cutoffs) == before + 1


def test_prefixes_of_purged_keys_are_erased_at_once_and_not_stored_by_new_models(setting: Setting) -> None:
    setting.client.zadd(keys.PREFIX_CUTOFFS, {"a": math.inf})
    setting.write("a", setting.now + 5)
    setting.eraser.do()
    assert owners_on_disk(setting.folder) == set()
    setting.workers.append(Worker("w2"))
    setting.eraser.do()
    setting.eraser.do()
    assert [worker.cutoffs for worker in setting.workers] == [[{"a": math.inf}]] * 2


def test_a_process_that_was_not_running_erases_when_it_starts(setting: Setting) -> None:
    setting.client.zadd(keys.PREFIX_CUTOFFS, {"a": math.inf, "b": setting.now - 10 * UNUSED_S})
    for owner in ("a", "b", "c"):
        setting.write(owner, setting.now - 11 * UNUSED_S)
    setting.new_eraser().round()
    assert owners_on_disk(setting.folder) == {"c"}


def test_a_disk_that_fails_is_tried_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.client.zadd(keys.PREFIX_CUTOFFS, {"a": math.inf})
    setting.write("a", setting.now)

    def fail(*_: object) -> None:
        raise OSError("the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(prefix_eraser, "erase", fail)
        setting.eraser.do()
    setting.eraser.do()
    assert owners_on_disk(setting.folder) == set()


def test_features_of_the_images_of_a_purged_owner_are_erased() -> None:
    features, adapted = FeatureCache(2**20), owner_with_adapter("me", "adapter")
    for owner in ("me", adapted, "you"):
        features.put((owner, "image"), mx.zeros(8))
    features.erase({"you": time.time() - 60.0})
    features.erase({"me": math.inf})
    features.put(("me", "image"), mx.zeros(8))
    found = {owner: features.get((owner, "image")) is not None for owner in ("me", adapted, "you")}
    assert found == {"me": False, adapted: False, "you": True}
    assert features.nbytes == mx.zeros(8).nbytes
    features.erase({"you": time.time()})
    assert features.nbytes == 0
