"""The model runner when allocations fail, and its estimates of the memory of rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from shared.models.folder import ModelError
from shared.settings import Settings
from tests.support.runner import alone, loaded, numbered, step
from worker.models.load import LoadedModel, load_model
from worker.runner import forward
from worker.runner.base import OutOfMemory, Row
from worker.runner.kv_cache import KVCache
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.weights import PADDING_DIVISOR

pytestmark = pytest.mark.usefixtures("own_data_dir")

CHUNK = 16
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Bytes of one token in the cache of the tiny model: keys and values, layers, heads, head size, bytes per number."""


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK)


MARK = 99
"""A token that makes the prefill run out of memory."""


@pytest.fixture
def scarce_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make the prefill of `MARK` run out of memory until this patch is undone."""
    fill = forward.fill

    def failing(
        model: object, cache: KVCache, tokens: Sequence[Sequence[int]], *more: object, **options: object
    ) -> None:
        if any(MARK in row for row in tokens):
            raise RuntimeError("[malloc] Unable to allocate 4294967296 bytes.")
        fill(model, cache, tokens, *more, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(forward, "fill", failing)
        yield patch


def marked(one: Row, index: int) -> Row:
    """Return a row with `MARK` at an index of its prompt."""
    return replace(one, prompt=(*one.prompt[:index], MARK, *one.prompt[index + 1 :]))


@pytest.mark.parametrize("length", [8, 5 * CHUNK], ids=["short", "long"])
def test_rows_that_run_out_of_memory_in_the_prefill_are_dropped_and_others_continue(
    tiny: LoadedModel, scarce_memory: pytest.MonkeyPatch, length: int
) -> None:
    runner = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28))
    running, bad = numbered(1, 40, 30), marked(numbered(2, length), length - 3)
    others = [numbered(uid, 8, 6) for uid in (3, 4, 5)]
    expected = {each.uid: alone(runner, each) for each in (running, *others)}
    runner.insert([replace(running, owner="me")])
    tokens: dict[int, list[int]] = defaultdict(list)
    dropped: list[int] = []
    for steps in range(60):
        if steps == 4:
            assert runner.stats()["prefix_cache_bytes"]
            runner.insert([others[0], bad, *others[1:]])
        output = step(runner)
        assert not output.failed
        if output.out_of_memory:
            assert not runner.stats()["prefix_cache_bytes"]
            dropped += output.out_of_memory
            runner.insert([each for each in others if each.uid in output.out_of_memory])
        for each in output.tokens:
            tokens[each.uid].append(each.token)
    assert 2 in dropped
    assert tokens == expected
    scarce_memory.undo()
    assert len(alone(runner, bad)) == bad.max_new_tokens


def test_other_errors_are_not_reported_as_out_of_memory(runner: MLXRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "fill", lambda *_, **__: 1 / 0)
    runner.insert([numbered(1, 5)])
    with pytest.raises(ZeroDivisionError):
        step(runner)


def test_a_failed_allocation_while_decoding_loses_the_batch(runner: MLXRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.insert([numbered(1, 5)])
    step(runner)

    def full(_: object) -> None:
        raise RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")

    monkeypatch.setattr("mlx.core.async_eval", full)
    with pytest.raises(OutOfMemory):
        step(runner)


def test_rows_stay_within_their_estimated_memory(tiny: LoadedModel) -> None:
    """If rows are admitted while their final lengths fit, rows and prefixes never exceed the limit."""
    limit = 12 * 768 * TOKEN_BYTES
    runner = MLXRunner(tiny, CHUNK, Memory(limit, limit))
    assert runner.row_bytes(12 * 768 + 1) > limit
    waiting = [replace(numbered(uid, 1 + uid * 37 % 300, 50 + uid * 13 % 60), owner="me") for uid in range(60)]
    running: dict[int, int] = {}
    remaining: dict[int, int] = {}
    max_rows = max_bytes = 0.0
    while waiting or remaining:
        while waiting and runner.batch_bytes([*running.values(), longest(waiting[0])]) <= limit:
            one = waiting.pop(0)
            running[one.uid], remaining[one.uid] = longest(one), one.max_new_tokens
            runner.set_prefix_limit(limit - runner.batch_bytes([*running.values()]))
            runner.insert([one])
        output = step(runner)
        max_rows = max(max_rows, len(output.tokens))
        for each in output.tokens:
            remaining[each.uid] -= 1
        ended = [uid for uid, tokens in remaining.items() if not tokens]
        runner.remove(ended)
        for uid in ended:
            del running[uid], remaining[uid]
        stats = runner.stats()
        max_bytes = max(max_bytes, stats["kv_bytes"] + stats["prefix_cache_bytes"])
    assert max_rows > 6
    assert limit / 4 < max_bytes <= limit


def longest(one: Row) -> int:
    """Return the final length of a row."""
    return len(one.prompt) + one.max_new_tokens


def test_a_long_row_does_not_increase_the_memory_of_short_rows(tiny: LoadedModel) -> None:
    """The estimate for a batch with one long row matches the memory that its caches take."""
    runner = MLXRunner(tiny, 256, Memory(2**24, 0))
    rows = [numbered(0, 6000, 120), *(numbered(uid, 100, 120) for uid in range(1, 33))]
    runner.insert(rows)
    while runner.prefillable():
        step(runner)
    assert len(runner._batches) == len(rows)
    exact = runner.row_bytes(6120) + 32 * runner.row_bytes(220)
    estimate = runner.batch_bytes([longest(each) for each in rows])
    assert runner._batches.nbytes <= exact <= estimate <= exact + 2**24 // PADDING_DIVISOR


def test_a_model_that_leaves_no_memory_is_not_served(tiny_model_path: Path) -> None:
    with pytest.raises(ModelError, match="MEMORY_LIMIT_BYTES"):
        loaded(Settings(model_path=tiny_model_path, memory_limit_bytes=1))
