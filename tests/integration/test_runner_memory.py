"""The model runner when memory runs short, and the memory that it counts for its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
from worker.runner.model_runner import PADDING_DIVISOR, MLXRunner

CHUNK = 16
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Bytes of one token in the cache of the tiny model: keys and values, layers, heads, width, bytes of a number."""


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK)


MARK = 99
"""A token whose prefill runs out of memory."""


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefill of `MARK` runs out of memory as many times as the list's only number says."""
    times, fill = [10**9], forward.fill

    def failing(model: object, cache: KVCache, tokens: Sequence[Sequence[int]], *more: object) -> None:
        if any(MARK in row for row in tokens) and times[0]:
            times[0] -= 1
            raise RuntimeError("[malloc] Unable to allocate 4294967296 bytes.")
        fill(model, cache, tokens, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "fill", failing)
    return times


def marked(one: Row, place: int) -> Row:
    return replace(one, prompt=(*one.prompt[:place], MARK, *one.prompt[place + 1 :]))


@pytest.mark.parametrize("length", [8, 5 * CHUNK], ids=["short", "long"])
def test_rows_whose_prompts_find_no_memory_are_dropped_and_the_others_go_on(
    tiny: LoadedModel, scarce: list[int], length: int
) -> None:
    runner = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28))
    running, bad = numbered(1, 40, most=30), marked(numbered(2, length), length - 3)
    others = [numbered(uid, 8, most=6) for uid in (3, 4, 5)]
    expected = {each.uid: alone(runner, each) for each in (running, *others)}
    runner.insert([replace(running, owner="me")])
    said: dict[int, list[int]] = defaultdict(list)
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
            said[each.uid].append(each.token)
    assert 2 in dropped
    assert said == expected
    scarce[0] = 0
    assert len(alone(runner, bad)) == bad.max_new_tokens


def test_other_errors_are_not_taken_for_want_of_memory(runner: MLXRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "fill", lambda *_: 1 / 0)
    runner.insert([numbered(1, 5)])
    with pytest.raises(ZeroDivisionError):
        step(runner)


def test_want_of_memory_while_decoding_loses_the_batch(runner: MLXRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.insert([numbered(1, 5)])
    step(runner)

    def full(_: object) -> None:
        raise RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")

    monkeypatch.setattr("mlx.core.async_eval", full)
    with pytest.raises(OutOfMemory):
        step(runner)


def test_rows_stay_within_the_memory_that_is_counted_for_them(tiny: LoadedModel) -> None:
    """Rows of all lengths, admitted while what they may grow to fits: rows and prefixes never take more."""
    limit = 12 * 768 * TOKEN_BYTES
    runner = MLXRunner(tiny, CHUNK, Memory(limit, limit))
    assert runner.row_bytes(12 * 768 + 1) > limit
    waiting = [replace(numbered(uid, 1 + uid * 37 % 300, 50 + uid * 13 % 60), owner="me") for uid in range(60)]
    running: dict[int, int] = {}
    left: dict[int, int] = {}
    rows = most = 0
    while waiting or left:
        while waiting and runner.batch_bytes([*running.values(), longest(waiting[0])]) <= limit:
            one = waiting.pop(0)
            running[one.uid], left[one.uid] = longest(one), one.max_new_tokens
            runner.set_prefix_limit(limit - runner.batch_bytes([*running.values()]))
            runner.insert([one])
        output = step(runner)
        rows = max(rows, len(output.tokens))
        for each in output.tokens:
            left[each.uid] -= 1
        ended = [uid for uid, more in left.items() if not more]
        runner.remove(ended)
        for uid in ended:
            del running[uid], left[uid]
        stats = runner.stats()
        most = max(most, stats["kv_bytes"] + stats["prefix_cache_bytes"])
    assert rows > 6
    assert limit / 4 < most <= limit


def longest(one: Row) -> int:
    return len(one.prompt) + one.max_new_tokens


def test_a_long_row_makes_the_others_no_dearer_than_they_are(tiny: LoadedModel) -> None:
    """What is counted for a batch is what its caches take: next to one long row, short ones keep their length."""
    runner = MLXRunner(tiny, 256, Memory(2**24, 0))
    rows = [numbered(0, 6000, 120), *(numbered(uid, 100, 120) for uid in range(1, 33))]
    runner.insert(rows)
    while runner.prefillable():
        step(runner)
    assert len(runner._batches) == len(rows)
    taken = runner._batches.nbytes
    counted, exact = runner.batch_bytes([longest(each) for each in rows]), runner.row_bytes(6120)
    exact += 32 * runner.row_bytes(220)
    assert taken <= exact <= counted <= exact + 2**24 // PADDING_DIVISOR


def test_a_model_that_leaves_no_memory_is_not_served(tiny_model_path: Path) -> None:
    with pytest.raises(ModelError, match="MEMORY_LIMIT_BYTES"):
        loaded(Settings(model_path=tiny_model_path, memory_limit_bytes=1))
