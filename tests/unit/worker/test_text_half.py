"""Multimodal folders whose images are not supported: their text is served, with mlx-vlm's logits."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from shared.models.catalog import load_catalog
from shared.models.folder import ModelError, check_folder, has_vision, model_kind
from shared.settings import Settings
from tests.support.architecture_configs import COMMON
from tests.support.architectures import lively, make
from tests.support.runner import alone, loaded, row
from worker.models import text_half
from worker.models.load import load_model

IDS = [3, 7, 9, 200, 4, 31]
_VISION: dict[str, Any] = {
    "model_type": "x",
    "spatial_merge_size": 2,
    **dict.fromkeys(("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size"), 8),
}
_MROPE = {"type": "default", "rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
_MROPE_HALF = _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_BIAS = {"attention_bias": True}

FAMILIES: dict[str, dict[str, Any]] = {
    "aya_vision": {"model_type": "cohere2"},
    "dots_ocr": _BIAS,
    "glm4v": _BIAS | {"model_type": "glm4v_text", "rope_scaling": _MROPE_HALF, "eos_token_id": [1]},
    "glm4v_moe": {"model_type": "glm4v_moe_text", "rope_scaling": _MROPE_HALF, "use_qk_norm": False},
    "granite_vision": {"model_type": "granite"},
    "granite4_vision": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 4,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 96,
        **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), 0),
    },
    "idefics2": {"model_type": "mistral"},
    "idefics3": {"model_type": "llama"},
    "internvl_chat": _BIAS | {"model_type": "qwen2"},
    "kimi_vl": {"model_type": "deepseek_v3"},
    "llava": {"model_type": "llama"},
    "llava_next": {"model_type": "mistral"},
    "llava_onevision": {"model_type": "qwen2"},
    "mage_vl": {"model_type": "qwen3"},
    "multi_modality": {"model_type": "llama"},
    "paddleocr_vl": {"rope_scaling": _MROPE},
    "smolvlm": {"model_type": "llama"},
}
"""What the configurations of the language models need beside `COMMON`. Without `model_type`, they have no section."""

NAMINGS: Mapping[str, Mapping[str, str]] = {
    "mlx-vlm": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "transformers": {"model.": "model.language_model."},
    "idefics": {"model.": "model.text_model."},
    "thinker": {"model.": "thinker.model.", "lm_head.": "thinker.lm_head."},
    "plain": {},
}
"""Prefixes of the language model's weights."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_support_for_its_images_has_the_logits_of_mlx_vlm(
    family: str, tmp_path: Path, tiny_model_path: Path
) -> None:
    config = config_of(family)
    language = language_model(family, config)
    weights = {f"language_model.{path}": array for path, array in arrays(language).items()}
    folder = write(tmp_path / family, config, weights, tiny_model_path)
    expected = language(mx.array([IDS])).logits
    model = load_model(folder)
    assert model.card.text_only
    assert mx.allclose(model.model(mx.array([IDS])), expected, rtol=1e-4, atol=1e-4).item()


def arrays(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def config_of(family: str) -> dict[str, Any]:
    text = COMMON | FAMILIES[family]
    whole = {"model_type": family, "vision_config": _VISION, "vocab_size": COMMON["vocab_size"], "eos_token_id": [1]}
    return whole | ({"text_config": text} if "model_type" in text else text | {"model_type": family})


def language_model(family: str, config: dict[str, Any]) -> Any:
    """Return mlx-vlm's language model with random weights."""
    module = importlib.import_module(f"mlx_vlm.models.{family}")
    own = json.loads(json.dumps(config))
    text = module.TextConfig.from_dict(own.get("text_config", own))
    try:
        whole = module.ModelConfig.from_dict(own)
        whole.vision_config = module.VisionConfig.from_dict(_VISION)
    except (KeyError, TypeError):  # it needs more of the vision half than the language model does
        whole = None
    try:
        model = module.LanguageModel(text)
        model.config = getattr(model, "config", None) or whole
    except TypeError:
        model = module.LanguageModel(text, whole)
    mx.random.seed(1)
    model.update(tree_map(lively, model.parameters()))
    return model


def write(folder: Path, config: dict[str, Any], weights: dict[str, mx.array], tokenizer: Path) -> Path:
    """Write a model folder with an image encoder, and the tokenizer of another one."""
    folder.mkdir()
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    encoder = {"vision_tower.w": mx.zeros(1)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights | encoder, metadata={"format": "mlx"})
    return folder


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("naming", NAMINGS)
def test_the_names_of_the_weights_may_have_any_usual_prefix(
    naming: str, bits: int | None, tmp_path: Path, tiny_model_path: Path
) -> None:
    model = make("phi3", bits=bits)
    weights = {renamed(path, NAMINGS[naming]): array for path, array in arrays(model).items()}
    weights["model.vision_embed_tokens.w"] = mx.zeros(1)
    config = COMMON | {"model_type": "phi3_v", "vision_config": _VISION}
    if bits:
        config["quantization"] = {"group_size": 32, "bits": bits, renamed("model.layers.0.x", NAMINGS[naming]): False}
    found = load_model(write(tmp_path / "phi", config, weights, tiny_model_path)).model
    assert mx.array_equal(found(mx.array([IDS])), model(mx.array([IDS]))).item()
    assert ("lm_head.scales" in arrays(found)) == bool(bits)


def renamed(path: str, prefixes: Mapping[str, str]) -> str:
    old = next((old for old in prefixes if path.startswith(old)), "")
    return prefixes.get(old, "") + path.removeprefix(old)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("paligemma", "gemma", "neither the images nor the text of model_type 'paligemma' are supported."),
        ("seer", "reader", "model_type 'seer' are supported: mlx-lm has no architecture 'reader'."),
        ("seer", "qwen3", "Missing"),
        ("seer", "gemma", "not in model"),
    ],
)
def test_a_folder_with_text_that_mlx_lm_would_compute_otherwise_is_refused(
    kind: str, text: str, message: str, tmp_path: Path, tiny_model_path: Path
) -> None:
    weights = {f"language_model.{path}": array for path, array in arrays(make("llama")).items()}
    config = {"model_type": kind, "vision_config": _VISION, "text_config": COMMON | {"model_type": text, "use_bias": 0}}
    folder = write(tmp_path / "model", config, weights, tiny_model_path)
    with pytest.raises(ModelError, match=message):
        load_model(folder)


@pytest.mark.parametrize(("name", "value"), [("qk_nope_head_dim", 128), ("scoring_func", "sigmoid")])
def test_a_deepseek_ocr_with_other_attention_or_another_router_is_refused(name: str, value: object) -> None:
    sections = {"language_config": {"hidden_size": 8, name: value}, "vision_config": _VISION, "projector_config": {}}
    with pytest.raises(ModelError, match=name):
        text_half._half_of(Path("model"), {"model_type": "deepseekocr", **sections})


def test_a_folder_without_a_section_for_text_has_mlx_lms_error(tmp_path: Path, tiny_model_path: Path) -> None:
    folder = write(tmp_path / "model", {"model_type": "nothing"}, {}, tiny_model_path)
    with pytest.raises(ModelError, match="Model type nothing not supported"):
        load_model(folder)


def test_a_text_only_model_is_served_and_says_so(tmp_path: Path, tiny_model_path: Path) -> None:
    vocabulary = json.loads((tiny_model_path / "config.json").read_text())["vocab_size"]
    weights = {f"language_model.{path}": array for path, array in arrays(make("llama", vocab_size=vocabulary)).items()}
    text = COMMON | {"model_type": "llama", "vocab_size": vocabulary}
    config = {"model_type": "idefics2", "vision_config": _VISION, "text_config": text}
    folder = write(tmp_path / "smol", config, weights, tiny_model_path)
    assert has_vision(folder)
    assert model_kind(folder) == "text"
    check_folder(folder)
    settings = Settings(
        model_path=folder, models_file=tmp_path / "none.toml", data_dir=tmp_path / "data", _env_file=None
    )
    catalog = load_catalog(settings)
    assert catalog.models[catalog.default].text_only
    runner = loaded(settings)
    assert runner.card.text_only
    assert len(alone(runner, row(1, IDS, 5))) == 5


def test_scales_of_quantised_dense_layers_are_split_like_their_weights() -> None:
    weights = {
        "model.layers.0.mlp.gate_proj.weight": mx.zeros((2, 4)),
        "model.layers.0.shared_mlp.input_linear.scales": mx.arange(4),
        "model.layers.0.shared_mlp.output_linear.biases": mx.ones(2),
        "lm_head.scales": mx.ones(2),
    }
    found = text_half._split_scales(weights)
    assert set(found) == {
        *("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_proj.scales"),
        *("model.layers.0.mlp.up_proj.scales", "model.layers.0.mlp.down_proj.biases"),
    }
    assert found["model.layers.0.mlp.up_proj.scales"].tolist() == [2, 3]
