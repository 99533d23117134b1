"""Prefixes of recurrent layers and sliding windows that are written to disk and read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support import architectures
from tests.support.prefix_caches import CacheFactory, counting, fetch_all, store
from worker.runner import forward
from worker.runner.kv_cache import KVCache
from worker.runner.kv_segments import Layout
from worker.runner.prefix.blocks import BLOCK, BlockChain, split_name
from worker.runner.prefix.disk import WRITE_BYTES_PER_S
from worker.runner.prefix.files import SUFFIX


@pytest.fixture
def factory_of(tmp_path: Path) -> Iterator[Callable[[Any], CacheFactory]]:
    """Returns a factory of caches of a model."""
    factories: list[CacheFactory] = []

    def create(model: Any) -> CacheFactory:
        factories.append(CacheFactory(tmp_path / "prefixes", model))
        return factories[-1]

    yield create
    for factory in factories:
        factory.close()


def test_of_close_checkpoints_only_the_first_is_written(factory_of: Callable[[Any], CacheFactory]) -> None:
    hybrid = architectures.make("qwen3_5", vocab_size=64)
    factory = factory_of(hybrid)
    cache, tokens = factory(), counting(1, 3 * BLOCK)
    lengths = (BLOCK, BLOCK + 20, 2 * BLOCK + 16, 2 * BLOCK + 17)
    for length in lengths:
        store(cache, hybrid, tokens[:length])
    state_bytes = cache.layout.state_bytes if cache.layout else 0
    cache.disk.token_s = state_bytes / WRITE_BYTES_PER_S / 100  # computing a state over 100 tokens pays
    cache.close(10)
    written = {split_name(path.stem)[1] for path in factory.folder.rglob("*-*" + SUFFIX)}
    assert written == {0, 16}  # tokens after a block: those of the first and of the third checkpoint
    assert fetch_all(factory(), tokens[: 2 * BLOCK + 17]) == 2 * BLOCK + 16


def test_the_last_checkpoint_whose_blocks_are_on_disk_is_read(factory_of: Callable[[Any], CacheFactory]) -> None:
    hybrid = architectures.make("qwen3_5", vocab_size=64)
    factory = factory_of(hybrid)
    cache, tokens = factory(), counting(1, 4 * BLOCK)
    for length in (BLOCK + 30, 3 * BLOCK + 30):
        store(cache, hybrid, tokens[:length])
    cache.close(10)
    files = {path.stem: path for path in factory.folder.rglob("*" + SUFFIX)}
    assert factory().stats()["prefix_disk_bytes"] == sum(path.stat().st_size for path in files.values())
    assert fetch_all(factory(), tokens) == 3 * BLOCK + 30
    names = [chain.name for chain in BlockChain.of("me").blocks(tokens)]
    assert [name in files for name in names] == [True, True, True, False]
    files[names[1]].unlink()
    assert fetch_all(factory(), tokens) == BLOCK + 30


def test_a_thinned_prefix_is_written_and_read_back(
    factory_of: Callable[[Any], CacheFactory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runner.kv_segments.CUTTABLE_TOKENS", 256)
    model = architectures.make("gemma3_text", vocab_size=64)
    layout, tokens = Layout.of(model), counting(1, 850)
    assert layout is not None
    limit = layout.nbytes(800)
    factory = factory_of(model)
    cache, row = factory(limit), KVCache.empty(model)
    for stop in range(50, len(tokens) + 1, 50):
        forward.fill(model, row, [tokens[stop - 50 : stop]])
        cache.store_partial("me", tokens[:stop], row, len(tokens))
    assert [cache.length("me", [*tokens[:length], 63]) for length in (850, 450)] == [850, 300]
    cache.close(20)
    again = factory(limit)
    assert fetch_all(again, tokens) == 850 - 850 % BLOCK
    assert again.length("me", [*tokens[:450], 63]) <= 300
    length, loaded = again.load("me", tokens)
    forward.fill(model, loaded, [tokens[length:]])
    found, expected = (forward.fill(model, each, [[9, 8, 7]]) for each in (loaded, row))
    assert found is not None and expected is not None
    assert mx.allclose(found, expected, atol=1e-3)
