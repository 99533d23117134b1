"""Adapters are checked by their headers: what they change, and why they cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from shared.models.adapters import AdapterLayer, adapter_folders, read_adapter
from shared.models.folder import ModelError

LAYER = "model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_a", f"{LAYER}.lora_b"
MATRICES = {A: (64, 8), B: (8, 32)}
PEFT = {
    f"base_model.model.{LAYER}.lora_A.weight": (8, 64),
    f"base_model.model.{LAYER}.lora_B.weight": (32, 8),
}
SETTINGS: dict[str, Any] = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}
PEFT_SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}


def write(folder: Path, settings: Any, shapes: dict[str, tuple[int, ...]], name: str = "adapters") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    weights = {each: mx.zeros(shape) for each, shape in shapes.items()}
    mx.save_safetensors(str(folder / f"{name}.safetensors"), weights)
    return folder


def problem(folder: Path, max_rank: int = 64) -> str:
    with pytest.raises(ModelError) as caught:
        read_adapter(folder, max_rank)
    assert str(folder.parent) not in str(caught.value), "API callers must not see paths"
    return str(caught.value)


def test_both_formats_describe_the_same_layer(tmp_path: Path) -> None:
    own = read_adapter(write(tmp_path / "own", SETTINGS, MATRICES), 8)
    peft = read_adapter(write(tmp_path / "peft", PEFT_SETTINGS, PEFT, "adapter_model"), 8)
    assert own.layers == (AdapterLayer(LAYER, A, B, (64, 8), (8, 32), 20.0),)
    assert peft.layers == (AdapterLayer(LAYER, *PEFT, (64, 8), (8, 32), 2.0),)
    assert (own.transposed, peft.transposed) == (False, True)
    assert (own.rank, own.layers[0].per_expert) == (8, False)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(tmp_path: Path) -> None:
    settings = {**PEFT_SETTINGS, "use_rslora": True}
    assert read_adapter(write(tmp_path / "a", settings, PEFT, "adapter_model"), 8).layers[0].scale == 16 / 8**0.5


def test_layers_with_experts_have_a_pair_of_matrices_for_each(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path / "a", SETTINGS, {A: (4, 8, 64), B: (4, 32, 8)}), 8)
    assert (adapter.rank, adapter.layers[0].per_expert) == (8, True)


@pytest.mark.parametrize(
    ("settings", "shapes", "expected"),
    [
        ({**SETTINGS, "fine_tune_type": "dora"}, MATRICES, "it is a DoRA; only LoRA is supported"),
        ({**SETTINGS, "fine_tune_type": "full"}, MATRICES, "it is a full fine-tuning"),
        ({**SETTINGS, "fine_tune_type": 3}, MATRICES, "it is of type 3"),
        ({"fine_tune_type": "lora"}, MATRICES, "adapter_config.json has no lora_parameters with a scale"),
        ({"lora_parameters": {"scale": "2"}}, MATRICES, "no lora_parameters with a scale"),
        ({"lora_parameters": {"scale": 10**400}}, MATRICES, "no lora_parameters with a scale"),
        ("[]", MATRICES, "adapter_config.json is not a JSON object"),
        (SETTINGS, {}, "adapters.safetensors has no LoRA weights"),
        (SETTINGS, {**MATRICES, f"{LAYER}.m": (8,)}, f"it has the weight '{LAYER}.m', which is not LoRA's"),
        (SETTINGS, {A: (64, 8)}, f"{LAYER} has only one of its two matrices"),
        (SETTINGS, {A: (64, 8), B: (4, 32)}, "do not fit together: [64, 8] and [4, 32]"),
        (SETTINGS, {A: (8,), B: (8,)}, "do not fit together"),
        (SETTINGS, {A: (64, 65), B: (65, 32)}, "its rank is 65, more than the limit of 64 (ADAPTER_MAX_RANK)"),
    ],
)
def test_an_adapter_that_cannot_be_used_says_why(
    tmp_path: Path, settings: Any, shapes: dict[str, tuple[int, ...]], expected: str
) -> None:
    assert expected in problem(write(tmp_path / "a", settings, shapes))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"peft_type": "LOHA"}, 'its peft_type is "LOHA"; only LORA is supported'),
        ({"use_dora": True}, "its adapter_config.json sets use_dora"),
        ({"bias": "all"}, "sets bias"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "sets alpha_pattern"),
        ({"lora_alpha": None}, "adapter_config.json has no lora_alpha"),
    ],
)
def test_what_only_peft_has_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    folder = write(tmp_path / "a", {**PEFT_SETTINGS, **changed}, PEFT, "adapter_model")
    assert expected in problem(folder)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    assert problem(folder) == "a has no adapter_config.json"
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    assert problem(folder) == "a lacks the weight file adapters.safetensors"
    weights = write(folder, SETTINGS, MATRICES) / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "adapters.safetensors has" in problem(folder)


def test_a_folder_of_adapters_has_one_in_each_subfolder(tmp_path: Path) -> None:
    for name in ("b", "a", "bad name"):
        write(tmp_path / name, SETTINGS, MATRICES)
    (tmp_path / "empty").mkdir()
    assert list(adapter_folders(tmp_path).items()) == [("a", tmp_path / "a"), ("b", tmp_path / "b")]
    assert adapter_folders(tmp_path / "missing") == {}
