"""Batches that do not keep to what was measured of a model, other types of weights, and the verdict on a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.settings import Settings
from tests.architectures.batches import LENGTHS, RESTRICTED, TOLERANCE_SHORT, compare_all, rows_of, runner_of
from tests.architectures.checks import batching
from tests.architectures.folders import write_folder
from tests.support.architecture_configs import config
from tests.support.architectures import make, measured, names
from tests.support.runner import loaded, step
from worker.runner import forward
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport
from worker.runner.kv_cache import Footprint, KVCache


@pytest.mark.parametrize("name", ["mamba", "afm7"])
def test_rows_differ_where_what_was_measured_is_ignored(name: str) -> None:
    with pytest.raises(AssertionError):
        compare_all(name, make(name), UNRESTRICTED)


@pytest.mark.parametrize("name", ["llama4", "gpt_bigcode", "deepseek_v41"])
def test_rows_that_cannot_share_a_pass_take_turns(name: str) -> None:
    runner = runner_of(name, make(name), RESTRICTED[name])
    rows = rows_of(LENGTHS)
    runner.insert(rows)
    seen: set[int] = set()
    for _ in range(len(rows) + 2):
        seen |= {each.uid for each in step(runner).tokens}
    assert seen == set(range(len(rows)))
    assert runner.stats()["length_buckets"] == len(rows)


@pytest.mark.parametrize("tokens", [20, 300, 700])
@pytest.mark.parametrize("name", ["llama4", "deepseek_v41"])
def test_the_memory_of_a_row_without_a_batch_cache_is_predicted(name: str, tokens: int) -> None:
    model = make(name)
    cache = KVCache.empty(model)
    for _ in range(0, tokens, 20):
        forward.fill(model, cache, [[1] * 20])
    mx.eval(cache.states)
    assert cache.nbytes <= Footprint.of(model).allocated(tokens) <= 20 * cache.nbytes


@pytest.mark.parametrize("name", ["mamba", "gpt_bigcode"])
def test_a_folder_is_measured_when_it_is_loaded_first(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / name, make(name), config(name))
    settings = Settings(
        model_path=folder, models_file=tmp_path / "none.toml", data_dir=tmp_path / "data", _env_file=None
    )
    found = loaded(settings).about["batching"]
    assert isinstance(found, dict)
    assert BatchingSupport.from_dict(found | {"reason": ""}) == RESTRICTED[name]
    (file,) = settings.batching_dir.iterdir()
    file.write_text(json.dumps(found | {"reason": "read"}))
    assert loaded(settings).about["batching"] == found | {"reason": "read"}


@pytest.mark.long
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", names())
def test_rows_in_short_types_are_the_same_beside_others(name: str, bits: int | None) -> None:
    try:
        model: Any = make(name, mx.bfloat16, bits)
        mx.eval(model(mx.array([[1, 2, 3]])))
    except (RuntimeError, TypeError) as error:  # a CPU has no experts of 16 bits, and one model cannot be quantised
        pytest.skip(str(error))
    found = measured(model)
    assert replace(found, reason="") == batching(name)
    # A token that is prefilled again is rounded otherwise than when it was decoded.
    compare_all(name, model, found, TOLERANCE_SHORT, cut=())
