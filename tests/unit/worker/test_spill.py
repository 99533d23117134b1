"""Prefixes that are written to disk and read back, on models of a few kilobytes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from shared.jobs.request import Request, Sampling
from tests.support.prefix_caches import PLENTY, CacheFactory, counting, fetch_all, filled, store
from tests.support.small_models import small_model
from worker.runner.base import Row
from worker.runner.kv_cache import KVCache
from worker.runner.kv_segments import Segment
from worker.runner.prefix.blocks import BLOCK
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.fetch import PrefixFetch
from worker.runner.prefix.files import SUFFIX, PrefixFiles

TOKEN_BYTES = 2 * 2 * 2 * 4 * 4
"""Keys and values, layers, heads, head size, bytes."""


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(llama, model_type="llama")


@pytest.fixture
def make(tmp_path: Path, model: Any) -> Iterator[CacheFactory]:
    factory = CacheFactory(tmp_path / "prefixes", model)
    yield factory
    factory.close()


def wait_for_writes(cache: PrefixCache) -> None:
    assert cache._spill is not None
    for write in cache._spill._writes:
        write.done.result(10)


def equal(cache: KVCache, expected: KVCache, length: int) -> bool:
    """Return whether the first tokens of two caches of one row are the same."""
    return all(
        mx.array_equal(array[:, :, :length], other[:, :, :length])
        for part, more in zip(cache.attention, expected.attention, strict=True)
        for array, other in zip(part.arrays, more.arrays, strict=True)
    )


def test_prefixes_in_memory_survive_a_restart_bit_for_bit(make: CacheFactory, model: Any) -> None:
    tokens = counting(1, 5 * BLOCK + 50)
    layers = filled(model, tokens)
    first = make()
    for length in (77, 2 * BLOCK + 3, len(tokens)):  # in steps that do not end at block boundaries
        first.store("me", tokens[:length], layers if length == len(tokens) else filled(model, tokens[:length]), 0)
    stored = first.load("me", tokens)[1]
    first.close(10)
    second = make()
    assert second.length("me", tokens) == 0
    assert fetch_all(second, tokens) == 5 * BLOCK
    length, loaded = second.load("me", tokens)
    assert length == 5 * BLOCK
    assert equal(loaded, stored, length)
    assert second.stats()["prefix_disk_read_blocks_total"] == 5
    assert second.stats()["prefix_disk_written_blocks_total"] == 0
    assert second.stats()["prefix_disk_bytes"] > 5 * BLOCK * TOKEN_BYTES


def test_blocks_before_the_first_difference_are_reused(make: CacheFactory, model: Any) -> None:
    tokens = counting(1, 3 * BLOCK)
    first = make()
    store(first, model, tokens)
    first.close(10)
    other = [*tokens[: 2 * BLOCK + 60], *counting(40, 90)]
    second = make()
    assert fetch_all(second, other) == 2 * BLOCK
    assert fetch_all(second, other, "you") == 0
    assert fetch_all(second, tokens[: BLOCK - 1]) == BLOCK - 1  # already in memory
    assert make().fetch("me", tokens[: BLOCK - 1]) is None


def test_disk_continues_a_prefix_in_memory_that_ends_within_a_block(make: CacheFactory, model: Any) -> None:
    tokens = counting(1, 4 * BLOCK)
    first = make()
    store(first, model, tokens)
    first.close(10)
    second = make()
    store(second, model, tokens[: BLOCK + 30])
    assert fetch_all(second, tokens) == 4 * BLOCK
    assert second.stats()["prefix_disk_read_blocks_total"] == 3
    assert second.nbytes == TOKEN_BYTES * 4 * BLOCK
    # Compare with a prefill of the same length: the last bits depend on it.
    assert equal(second.load("me", tokens)[1], filled(model, tokens[: BLOCK + 30]), BLOCK)


def test_evicted_prefixes_are_written_and_read_back(make: CacheFactory, model: Any) -> None:
    cache = make(max_bytes=TOKEN_BYTES * 4 * BLOCK)
    first, second = counting(1, 3 * BLOCK), counting(5, 3 * BLOCK)
    store(cache, model, first)
    assert make.on_disk() == 0  # nothing is written before it is reused or evicted
    store(cache, model, second)
    assert cache.length("me", first) == 0
    wait_for_writes(cache)
    assert make.on_disk() == 3
    assert fetch_all(cache, first) == 3 * BLOCK
    assert cache.length("me", second) == 0
    wait_for_writes(cache)
    assert fetch_all(cache, second) == 3 * BLOCK
    assert cache.nbytes <= TOKEN_BYTES * 4 * BLOCK


def test_reused_prefixes_are_written_before_shutdown(make: CacheFactory, model: Any) -> None:
    cache = make()
    tokens = counting(1, 3 * BLOCK)
    store(cache, model, tokens)
    cache.load("me", [*tokens, 1, 2])
    assert make.on_disk() == 0  # not written while the row waits for its first token
    cache.set_limit(PLENTY)
    wait_for_writes(cache)
    assert make.on_disk() == 3
    assert fetch_all(make(), tokens) == 3 * BLOCK  # by a second worker while the first one runs
    cache.load("me", [*tokens, 1, 2])
    cache.set_limit(PLENTY)
    wait_for_writes(cache)
    assert cache.stats()["prefix_disk_written_blocks_total"] == 3


def test_pending_writes_are_bounded(make: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(max_bytes=TOKEN_BYTES * 2 * BLOCK, max_pending=TOKEN_BYTES * 5 * BLOCK)
    with slow_disk(monkeypatch, "write"):
        for i in range(20):
            store(cache, model, counting(i, 2 * BLOCK))
            assert cache._spill is not None and cache._spill.pending_bytes <= TOKEN_BYTES * 5 * BLOCK
        cache.set_limit(TOKEN_BYTES * 6 * BLOCK)
        assert cache.nbytes + cache._spill.pending_bytes <= TOKEN_BYTES * 6 * BLOCK
    wait_for_writes(cache)
    assert cache._spill.pending_bytes == 0
    assert make.on_disk() == 4


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch, operation: str) -> Iterator[None]:
    """Block an operation of the disk until the end of the context."""
    released, real = threading.Event(), getattr(PrefixFiles, operation)

    def slow(*args: Any) -> object:
        assert released.wait(20)
        return real(*args)

    monkeypatch.setattr(PrefixFiles, operation, slow)
    try:
        yield
    finally:
        released.set()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_caches_of_every_number_type_are_valid_safetensors_files(
    make: CacheFactory, model: Any, dtype: mx.Dtype
) -> None:
    tokens = counting(1, BLOCK)
    batch = filled(model, tokens)
    layers = batch.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys.astype(dtype), layer.values.astype(dtype)
    first = make()
    first.store("me", tokens, batch, 0)
    first.close(10)
    (path,) = make.folder.rglob("*" + SUFFIX)
    arrays = mx.load(str(path))
    assert {array.dtype for array in arrays.values()} == {dtype}
    assert mx.array_equal(arrays["0"], layers[0].keys[:, :, :BLOCK])
    assert mx.array_equal(arrays["3"], layers[1].values[:, :, :BLOCK])
    second = make()
    assert fetch_all(second, tokens) == BLOCK
    assert equal(second.load("me", tokens)[1], batch, BLOCK)


def test_a_prefix_ends_before_a_broken_block(make: CacheFactory, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens = counting(1, 4 * BLOCK)
    first = make()
    store(first, model, tokens)
    first.close(10)
    third = sorted(make.folder.rglob("*" + SUFFIX), key=lambda path: -path.stat().st_mtime_ns)[2]
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    third.write_bytes(content)
    second = make()
    assert fetch_all(second, tokens) == 2 * BLOCK
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    store(second, model, tokens)
    second.close(10)
    assert fetch_all(make(), tokens) == 4 * BLOCK  # rewritten


def test_a_failing_disk_is_disabled_with_one_log_line(
    make: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = make(max_bytes=TOKEN_BYTES * 3 * BLOCK)
    monkeypatch.setattr("worker.runner.prefix.blocks.write", full)
    for i in range(5):
        store(cache, model, counting(i, 2 * BLOCK))
        wait_for_writes(cache)
    assert cache.length("me", counting(4, 2 * BLOCK)) == 2 * BLOCK
    assert cache.fetch("me", counting(0, 2 * BLOCK)) is None
    [record] = caplog.records
    assert record.getMessage() == "prefix_disk_off"
    assert vars(record)["reason"] == "[Errno 28] No space left on device"


def test_number_types_that_cannot_be_written_only_disable_the_disk(
    make: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.runner.kv_segments._TYPES", {})
    cache = make()
    store(cache, model, counting(1, 2 * BLOCK))
    assert cache.load("me", counting(1, 2 * BLOCK))[0] == 2 * BLOCK
    cache.set_limit(PLENTY)
    cache.close(1)
    assert make.on_disk() == 0
    assert len(caplog.records) == 1


def test_an_unusable_folder_only_disables_the_disk(
    make: CacheFactory, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make.folder.write_text("a file")
    cache = make()
    store(cache, model, counting(1, 2 * BLOCK))
    assert cache.load("me", counting(1, 2 * BLOCK))[0] == 2 * BLOCK
    cache.close(1)
    assert len(caplog.records) == 1


def test_segments_are_freed_by_the_engine_thread(
    make: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    freed: list[str] = []
    # Reference cycles of other tests would be freed by the thread that happens to run the collector.
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    monkeypatch.setattr(Segment, "__del__", lambda _: freed.append(threading.current_thread().name), raising=False)
    cache = make(max_bytes=TOKEN_BYTES * 2 * BLOCK)
    for i in range(6):
        store(cache, model, counting(i, 2 * BLOCK))
        wait_for_writes(cache)
    cache.set_limit(0)
    wait_for_writes(cache)
    cache.set_limit(0)
    assert len(freed) >= 6
    assert set(freed) == {threading.current_thread().name}


def row(uid: int, tokens: Sequence[int]) -> Row:
    return Row(uid, Request("m", 5, Sampling(0.0)), (*tokens, 1), 0, 5, "me")


def test_rows_wait_for_the_disk_up_to_a_timeout_and_independently(
    make: CacheFactory, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = counting(1, 3 * BLOCK)
    first = make()
    store(first, model, tokens)
    first.close(10)
    cache = make()
    fetching = PrefixFetch(cache)
    assert not fetching.add(row(0, counting(3, 3 * BLOCK)))
    with slow_disk(monkeypatch, "read"):
        assert fetching.add(row(1, tokens))
        assert fetching.add(row(2, tokens))
        assert fetching.add(row(3, tokens))
        fetching.remove([2, 9])
        assert fetching.ready() == []
        monkeypatch.setattr("worker.runner.prefix.fetch.TIMEOUT_S", 0.0)
        assert fetching.add(row(4, tokens))
        assert [each.uid for each in fetching.ready()] == [4]
    ready: list[int] = []
    while len(ready) < 2:
        if pending := fetching.next_read():
            pending.result(10)
        ready += [each.uid for each in fetching.ready()]
    assert sorted(ready) == [1, 3]
    assert cache.length("me", tokens) == 3 * BLOCK
    assert cache.stats()["prefix_disk_read_blocks_total"] == 3  # one read for all rows
    assert fetching.ready() == []


def test_only_the_shared_part_of_a_prefix_is_shared_on_disk(make: CacheFactory, model: Any) -> None:
    tokens = counting(1, 3 * BLOCK + 9)
    first = make()
    store(first, model, tokens)
    first.share("me", tokens[: 2 * BLOCK])
    first.close(10)
    second = make()
    assert fetch_all(second, tokens, "you") == 2 * BLOCK
    assert fetch_all(second, tokens, "me") == 3 * BLOCK
    assert second.length("you", tokens) == 2 * BLOCK
