"""What a model's proof finds: nothing wrong with good models, and each mistake that a model library might make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache

from shared.models.registry import ModelCard
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.architectures import make, measured
from worker.models.load import LoadedModel
from worker.runner.batching import verdict
from worker.runner.batching.layer_sample import in_float32, sample_of
from worker.runner.batching.proof import CannotRun
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport, Together
from worker.runner.column_cache import ColumnCache
from worker.runner.kv_cache import KVCache

ANY, EQUAL_LENGTHS, ONE_BY_ONE = Together


def mask_without_padding(patch: pytest.MonkeyPatch) -> None:
    def make_mask(self: Any, tokens: int, *, return_array: bool = False, **options: Any) -> mx.array:
        return create_causal_mask(tokens, offset=self.end, **options)

    patch.setattr(ColumnCache, "make_mask", make_mask)


def positions_of_columns(patch: pytest.MonkeyPatch) -> None:
    def offset(self: Any) -> mx.array:
        return mx.full(self.left_padding.shape, self.end)

    patch.setattr(ColumnCache, "offset", property(offset, lambda _self, _value: None), raising=False)


def padding_stays_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ColumnCache, "finalize", lambda _self: None)


def padding_enters_the_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ArraysCache, "make_mask", lambda _self, _tokens: None)
    patch.setattr(ArraysCache, "prepare", lambda _self, **_options: None)


def window_without_padding(patch: pytest.MonkeyPatch) -> None:
    right = ColumnCache.make_mask

    def make_mask(self: Any, *arguments: Any, **options: Any) -> mx.array:
        kept = self.left_padding
        self.left_padding = kept if self.window is None else mx.zeros_like(kept)
        mask: mx.array = right(self, *arguments, **options)
        self.left_padding = kept
        return mask

    patch.setattr(ColumnCache, "make_mask", make_mask)


def rows_mixed_up(patch: pytest.MonkeyPatch) -> None:
    right = ColumnCache.update_and_fetch

    def update(self: Any, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = right(self, keys, values)
        return keys[::-1], values[::-1]

    patch.setattr(ColumnCache, "update_and_fetch", update)


def state_lost(patch: pytest.MonkeyPatch) -> None:
    right = KVCache.copy_states

    def copy_states(self: Any, row: int) -> Any:
        return [[mx.zeros_like(array) for array in arrays] for arrays in right(self, row)]

    patch.setattr(KVCache, "copy_states", copy_states)


Break = Callable[[pytest.MonkeyPatch], None]

BROKEN: list[tuple[Break, str, BatchingSupport]] = [
    *(
        (mask_without_padding, name, BatchingSupport(EQUAL_LENGTHS, EQUAL_LENGTHS))
        for name in ("llama", "qwen2", "qwen3_moe", "deepseek_v3", "cohere", "falcon_h1")
    ),
    *(
        (positions_of_columns, name, BatchingSupport(EQUAL_LENGTHS, EQUAL_LENGTHS))
        for name in ("phi3", "gpt2", "gpt_neox", "mixtral", "olmo2", "qwen3_next")
    ),
    *((padding_stays_behind, name, BatchingSupport(EQUAL_LENGTHS, ANY)) for name in ("starcoder2", "glm4", "minicpm")),
    *(
        (padding_enters_the_state, name, BatchingSupport(EQUAL_LENGTHS, ANY))
        for name in ("mamba2", "lfm2", "qwen3_5", "granitemoehybrid", "plamo2")
    ),
    *(
        (window_without_padding, name, BatchingSupport(EQUAL_LENGTHS, EQUAL_LENGTHS))
        for name in ("gemma3_text", "gpt_oss", "exaone4", "olmo3")
    ),
    *((rows_mixed_up, name, BatchingSupport(ONE_BY_ONE, ONE_BY_ONE)) for name in ("stablelm", "helium")),
    *((state_lost, name, BatchingSupport(ANY, ANY, continues=False)) for name in ("kimi_linear", "bailing_hybrid")),
]


@pytest.mark.parametrize(
    ("break_it", "name", "expected"), BROKEN, ids=[f"{each.__name__}-{name}" for each, name, _ in BROKEN]
)
def test_a_mistake_in_a_good_model_is_found(
    break_it: Break, name: str, expected: BatchingSupport, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    assert measured(model) == UNRESTRICTED
    break_it(monkeypatch)
    found = measured(model)
    assert found.reason
    assert (found.prefill, found.decode, found.continues) == (expected.prefill, expected.decode, expected.continues)


def test_a_mistake_that_only_long_contexts_show_is_found() -> None:
    model = make("minimax_m3_vl", index_block_size=128, index_topk_blocks=16)
    assert measured(model).decode is EQUAL_LENGTHS
    assert {layer.self_attn.index_block_size for layer in model.layers} == {128}


def test_a_model_that_fails_with_a_single_row_is_refused() -> None:
    model = make("llama")
    model.model.norm.weight = mx.ones(3)
    with pytest.raises(CannotRun, match="The model does not run: "):
        measured(model)


def test_the_number_of_passes_does_not_depend_on_the_layers() -> None:
    few: list[None] = []
    many: list[None] = []
    assert measured(make("llama"), few) == measured(make("llama", num_hidden_layers=24), many) == UNRESTRICTED
    assert len(few) == len(many) <= 100


@pytest.mark.parametrize(
    ("name", "layers", "expected"), [("llama", 24, 4), ("gemma3_text", 24, 4), ("qwen3_next", 24, 4), ("mamba2", 4, 4)]
)
def test_a_sample_has_a_layer_of_each_kind_and_shares_them(name: str, layers: int, expected: int) -> None:
    model = make(name, num_hidden_layers=layers)
    sample = sample_of(model)
    assert len(sample.layers) == expected
    assert len(model.layers) == layers
    assert all(one is other for one, other in zip(sample.layers, model.layers, strict=False))


def test_a_sample_goes_as_far_as_the_first_layer_of_the_last_kind() -> None:
    sample = sample_of(make("jamba", num_hidden_layers=16, attn_layer_offset=6, attn_layer_period=8))
    assert len(sample.layers) == 7


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_computes_in_float32_for_a_while_only(bits: int | None) -> None:
    model, ids = make("qwen2", mx.bfloat16, bits), mx.array([[1, 2, 3]])
    with in_float32(model, 2**30) as exactly:
        assert exactly
        assert model(ids).dtype == mx.float32
    assert model(ids).dtype == mx.bfloat16
    with in_float32(model, 1000) as exactly:
        assert not exactly
        assert model(ids).dtype == mx.bfloat16


def test_a_second_load_reads_what_the_first_one_measured(tmp_path: Path) -> None:
    model = loaded("mamba")
    first = find(model, tmp_path)
    assert first.passes > 0
    assert first.found.prefill is EQUAL_LENGTHS
    assert find(model, tmp_path) == Found(first.found, 0)


def test_what_was_measured_of_other_versions_or_types_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama")
    find(model, tmp_path)
    assert find(loaded("llama", mx.bfloat16), tmp_path).passes > 0
    monkeypatch.setattr(verdict, "version", lambda library: f"{library} 0.0.1")
    assert find(model, tmp_path).passes > 0
    assert find(model, tmp_path).passes == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"prefill": "all"})])
def test_a_damaged_file_is_measured_anew(content: str, tmp_path: Path) -> None:
    model = loaded("llama")
    find(model, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert find(model, tmp_path).passes > 0
    assert find(model, tmp_path).passes == 0


class Found(NamedTuple):
    """A verdict, and how many passes it took."""

    found: BatchingSupport
    passes: int


def find(model: LoadedModel, folder: Path) -> Found:
    finding, passes = verdict.find(model, VOCABULARY, 2**32, folder), 0
    while True:
        try:
            next(finding)
        except StopIteration as end:
            return Found(end.value, passes)
        passes += 1


def loaded(name: str, dtype: mx.Dtype = mx.float32) -> LoadedModel:
    return LoadedModel(make(name, dtype), None, config(name), ModelCard(name, "text", 512), frozenset())
