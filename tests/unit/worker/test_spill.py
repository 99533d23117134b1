"""Prefixes that memory gives up, on disk and back, on models of a few kilobytes."""

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
from worker.runner import forward
from worker.runner.base import Row
from worker.runner.kv_cache import KVCache, RowCache
from worker.runner.kv_segments import AttentionSegment
from worker.runner.prefix.blocks import BLOCK
from worker.runner.prefix.cache import PrefixCache
from worker.runner.prefix.fetch import PrefixFetch
from worker.runner.prefix.files import SUFFIX, PrefixFiles
from worker.runner.prefix.spill import Spill

PLENTY = 2**30
TOKEN_BYTES = 2 * 2 * 2 * 4 * 4
"""Keys and values, layers, heads, width, bytes."""


@pytest.fixture(scope="module")
def model() -> Any:
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "vocab_size": 64, "model_type": "llama"}
    return llama.Model(llama.ModelArgs.from_dict({**widths, **more}))


class Maker:
    """Caches over one folder, one after the other or at once, each as a worker would have it."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        self._model = model
        self.spills: list[Spill] = []

    def __call__(self, most_bytes: int = PLENTY, disk_bytes: int = PLENTY, held: int = PLENTY // 8) -> PrefixCache:
        spill = Spill(PrefixFiles(self.folder, "model", disk_bytes, 1e6), held)
        spill.open()
        self.spills.append(spill)
        return PrefixCache(self._model, most_bytes + held, spill)

    def on_disk(self) -> int:
        return len(list(self.folder.rglob("*" + SUFFIX)))


@pytest.fixture
def make(tmp_path: Path, model: Any) -> Iterator[Maker]:
    maker = Maker(tmp_path / "prefixes", model)
    yield maker
    for spill in maker.spills:
        spill.close(10)


def counting(start: int, length: int) -> list[int]:
    return [(start + i * 7 + i // 64) % 64 for i in range(length)]


def read(model: Any, tokens: Sequence[int]) -> KVCache:
    cache = KVCache.empty(model)
    forward.fill(model, cache, [tokens])
    return cache


def keep(cache: PrefixCache, model: Any, tokens: Sequence[int], owner: str = "me") -> None:
    cache.store(owner, tokens, read(model, tokens), 0)


def bring(cache: PrefixCache, tokens: Sequence[int], owner: str = "me") -> int:
    """How many of these tokens memory has, once what disk has of them is there."""
    fetch = cache.fetch(owner, tokens)
    while fetch is not None:
        fetch.blocks[0][1].result(10)
        if not cache.add_fetched(fetch):
            break
    return cache.length(owner, tokens)


def settle(cache: PrefixCache) -> None:
    """Wait until all is written that is on its way."""
    assert cache._spill is not None
    for write in cache._spill._writes:
        write.done.result(10)


def equal(layers: RowCache, wanted: RowCache, length: int) -> bool:
    return all(
        mx.array_equal(each.keys[:, :, :length], other.keys[:, :, :length])
        and mx.array_equal(each.values[:, :, :length], other.values[:, :, :length])
        for each, other in zip(layers, wanted, strict=True)
    )


def test_what_is_in_memory_at_the_end_is_there_at_the_next_beginning_bit_for_bit(make: Maker, model: Any) -> None:
    tokens = counting(1, 5 * BLOCK + 50)
    layers = read(model, tokens)
    first = make()
    for length in (77, 2 * BLOCK + 3, len(tokens)):  # in pieces whose ends are not those of blocks
        first.store("me", tokens[:length], layers if length == len(tokens) else read(model, tokens[:length]), 0)
    kept = first.load("me", tokens)[1]
    first.close(10)
    second = make()
    assert second.length("me", tokens) == 0
    assert bring(second, tokens) == 5 * BLOCK
    length, found = second.load("me", tokens)
    assert length == 5 * BLOCK
    assert equal(found, kept, length)
    assert second.stats()["prefix_disk_read_blocks_total"] == 5
    assert second.stats()["prefix_disk_written_blocks_total"] == 0
    assert second.stats()["prefix_disk_bytes"] > 5 * BLOCK * TOKEN_BYTES


def test_of_what_differs_later_the_blocks_before_are_of_use(make: Maker, model: Any) -> None:
    tokens = counting(1, 3 * BLOCK)
    first = make()
    keep(first, model, tokens)
    first.close(10)
    other = [*tokens[: 2 * BLOCK + 60], *counting(40, 90)]
    second = make()
    assert bring(second, other) == 2 * BLOCK
    assert bring(second, other, "you") == 0
    assert bring(second, tokens[: BLOCK - 1]) == BLOCK - 1  # in memory meanwhile
    assert make().fetch("me", tokens[: BLOCK - 1]) is None


def test_disk_goes_on_where_memory_ends_also_inside_a_block(make: Maker, model: Any) -> None:
    tokens = counting(1, 4 * BLOCK)
    first = make()
    keep(first, model, tokens)
    first.close(10)
    second = make()
    keep(second, model, tokens[: BLOCK + 30])
    assert bring(second, tokens) == 4 * BLOCK
    assert second.stats()["prefix_disk_read_blocks_total"] == 3
    assert second.nbytes == TOKEN_BYTES * 4 * BLOCK
    # As many tokens as were read at once: the last bits depend on that.
    assert equal(second.load("me", tokens)[1], read(model, tokens[: BLOCK + 30]).copy_row(0), BLOCK)


def test_what_memory_gives_up_goes_to_disk_and_comes_back(make: Maker, model: Any) -> None:
    cache = make(most_bytes=TOKEN_BYTES * 4 * BLOCK)
    first, second = counting(1, 3 * BLOCK), counting(5, 3 * BLOCK)
    keep(cache, model, first)
    assert make.on_disk() == 0  # nothing is written that was of no use yet and has its place
    keep(cache, model, second)
    assert cache.length("me", first) == 0
    settle(cache)
    assert make.on_disk() == 3
    assert bring(cache, first) == 3 * BLOCK
    assert cache.length("me", second) == 0
    settle(cache)
    assert bring(cache, second) == 3 * BLOCK
    assert cache.nbytes <= TOKEN_BYTES * 4 * BLOCK


def test_what_was_of_use_is_on_disk_before_any_end(make: Maker, model: Any) -> None:
    cache = make()
    tokens = counting(1, 3 * BLOCK)
    keep(cache, model, tokens)
    cache.load("me", [*tokens, 1, 2])
    assert make.on_disk() == 0  # not while the row that it is for waits for its first token
    cache.set_limit(PLENTY)
    settle(cache)
    assert make.on_disk() == 3
    assert bring(make(), tokens) == 3 * BLOCK  # beside the first, which has not ended
    cache.load("me", [*tokens, 1, 2])
    cache.set_limit(PLENTY)
    settle(cache)
    assert cache.stats()["prefix_disk_written_blocks_total"] == 3


def test_what_waits_for_the_disk_is_bounded(make: Maker, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(most_bytes=TOKEN_BYTES * 2 * BLOCK, held=TOKEN_BYTES * 5 * BLOCK)
    with slow_disk(monkeypatch, "write"):
        for i in range(20):
            keep(cache, model, counting(i, 2 * BLOCK))
            assert cache._spill is not None and cache._spill.held <= TOKEN_BYTES * 5 * BLOCK
        cache.set_limit(TOKEN_BYTES * 6 * BLOCK)
        assert cache.nbytes + cache._spill.held <= TOKEN_BYTES * 6 * BLOCK
    settle(cache)
    assert cache._spill.held == 0
    assert make.on_disk() == 4


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch, what: str) -> Iterator[None]:
    """A disk that does nothing until the end of this."""
    go, real = threading.Event(), getattr(PrefixFiles, what)

    def slow(*args: Any) -> object:
        assert go.wait(20)
        return real(*args)

    monkeypatch.setattr(PrefixFiles, what, slow)
    try:
        yield
    finally:
        go.set()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_every_type_of_cache_is_a_safetensors_file_that_others_can_read(
    make: Maker, model: Any, dtype: mx.Dtype
) -> None:
    tokens = counting(1, BLOCK)
    read_cache = read(model, tokens)
    layers = read_cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys.astype(dtype), layer.values.astype(dtype)
    first = make()
    first.store("me", tokens, read_cache, 0)
    first.close(10)
    (path,) = make.folder.rglob("*" + SUFFIX)
    arrays = mx.load(str(path))
    assert {array.dtype for array in arrays.values()} == {dtype}
    assert mx.array_equal(arrays["0"], layers[0].keys[:, :, :BLOCK])
    assert mx.array_equal(arrays["3"], layers[1].values[:, :, :BLOCK])
    second = make()
    assert bring(second, tokens) == BLOCK
    assert equal(second.load("me", tokens)[1], layers, BLOCK)


def test_a_broken_block_ends_the_prefix_there(make: Maker, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens = counting(1, 4 * BLOCK)
    first = make()
    keep(first, model, tokens)
    first.close(10)
    third = sorted(make.folder.rglob("*" + SUFFIX), key=lambda path: -path.stat().st_mtime_ns)[2]
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    third.write_bytes(content)
    second = make()
    assert bring(second, tokens) == 2 * BLOCK
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    keep(second, model, tokens)
    second.close(10)
    assert bring(make(), tokens) == 4 * BLOCK  # written anew


def test_a_disk_that_fails_is_given_up_with_one_line(
    make: Maker, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = make(most_bytes=TOKEN_BYTES * 3 * BLOCK)
    monkeypatch.setattr("worker.runner.prefix.blocks.write", full)
    for i in range(5):
        keep(cache, model, counting(i, 2 * BLOCK))
        settle(cache)
    assert cache.length("me", counting(4, 2 * BLOCK)) == 2 * BLOCK
    assert cache.fetch("me", counting(0, 2 * BLOCK)) is None
    [record] = caplog.records
    assert record.getMessage() == "prefix_disk_off"
    assert vars(record)["reason"] == "[Errno 28] No space left on device"


def test_arrays_that_cannot_be_written_harm_no_row(
    make: Maker, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.runner.kv_segments._TYPES", {})
    cache = make()
    keep(cache, model, counting(1, 2 * BLOCK))
    assert cache.load("me", counting(1, 2 * BLOCK))[0] == 2 * BLOCK
    cache.set_limit(PLENTY)
    cache.close(1)
    assert make.on_disk() == 0
    assert len(caplog.records) == 1


def test_a_folder_that_cannot_be_used_costs_nothing_but_the_disk(
    make: Maker, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make.folder.write_text("a file")
    cache = make()
    keep(cache, model, counting(1, 2 * BLOCK))
    assert cache.load("me", counting(1, 2 * BLOCK))[0] == 2 * BLOCK
    cache.close(1)
    assert len(caplog.records) == 1


def test_what_is_freed_of_mlx_is_freed_by_its_own_thread(
    make: Maker, model: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    freed: list[str] = []
    # What other tests have left behind in circles is freed by whichever thread Python's collector happens to run on.
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    monkeypatch.setattr(
        AttentionSegment, "__del__", lambda _: freed.append(threading.current_thread().name), raising=False
    )
    cache = make(most_bytes=TOKEN_BYTES * 2 * BLOCK)
    for i in range(6):
        keep(cache, model, counting(i, 2 * BLOCK))
        settle(cache)
    cache.set_limit(0)
    settle(cache)
    cache.set_limit(0)
    assert len(freed) >= 6
    assert set(freed) == {threading.current_thread().name}


def row(uid: int, tokens: Sequence[int]) -> Row:
    return Row(uid, Request("m", 5, Sampling(0.0)), (*tokens, 1), 0, 5, "me")


def test_rows_wait_for_the_disk_but_not_for_ever_and_not_for_each_other(
    make: Maker, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = counting(1, 3 * BLOCK)
    first = make()
    keep(first, model, tokens)
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
    came: list[int] = []
    while len(came) < 2:
        if pending := fetching.next_read():
            pending.result(10)
        came += [each.uid for each in fetching.ready()]
    assert sorted(came) == [1, 3]
    assert cache.length("me", tokens) == 3 * BLOCK
    assert cache.stats()["prefix_disk_read_blocks_total"] == 3  # once for all of them
    assert fetching.ready() == []


def test_what_is_everybodys_is_so_on_disk_too_and_nothing_behind_it(make: Maker, model: Any) -> None:
    tokens = counting(1, 3 * BLOCK + 9)
    first = make()
    keep(first, model, tokens)
    first.share("me", tokens[: 2 * BLOCK])
    first.close(10)
    second = make()
    assert bring(second, tokens, "you") == 2 * BLOCK
    assert bring(second, tokens, "me") == 3 * BLOCK
    assert second.length("you", tokens) == 2 * BLOCK
