"""Folders with the weights of tiny vision models as Hugging Face publishes them: other names, shapes and divisions.

The names are those of the models' own repositories; `VISION_MODELS` are saved as mlx-vlm saves a converted folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import mlx.core as mx

Weights: TypeAlias = dict[str, mx.array]
Change: TypeAlias = Callable[[Weights], Weights]

_WEIGHTS: Final = "model.safetensors"
_CONVOLUTION: Final = re.compile(
    r"(patch_embed\.proj|patch_conv|patch_embeddings?(\.projection)?|downsample|conv1d|conv|neck(_hd)?\.\d|net_\d"
    r"|downsamples\.\d)\.weight$"
)
_FP8: Final = re.compile(r"(?<!vision)_model\..*layers\.\d+\..*proj\.weight$")
_EXPERTS: Final = ".switch_mlp."
_NORMS: Final = re.compile(r"(input_layernorm|post_attention_layernorm|language_model\.norm|[qk]_norm)\.weight$")


def publish(
    folder: Path, target: Path, changes: Sequence[Change], quantisation: Mapping[str, object] | None = None
) -> Path:
    """Copy a model's folder, with other weights.

    Args:
        quantisation: `quantization_config` of config.json.
    """
    shutil.copytree(folder, target)
    if quantisation is not None:
        config = json.loads((folder / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    weights: Weights = dict(mx.load(str(folder / _WEIGHTS)))  # type: ignore[arg-type]
    for change in changes:
        weights = change(weights)
    mx.save_safetensors(str(target / _WEIGHTS), weights, metadata={"format": "pt"})
    return target


def _renamed(*rules: tuple[str, str]) -> Change:
    """Rename weights by the first rule, a pattern and its replacement, that applies to a name."""

    def name(path: str) -> str:
        return next((new for old, to in rules if (new := re.sub(old, to, path)) != path), path)

    return lambda weights: {name(path): array for path, array in weights.items()}


def _channels_first(weights: Weights) -> Weights:
    """Give the weights of convolutions PyTorch's order of axes."""
    return {
        path: mx.contiguous(mx.moveaxis(array, -1, 1)) if array.ndim > 2 and _CONVOLUTION.search(path) else array
        for path, array in weights.items()
    }


def _single_experts(weights: Weights) -> Weights:
    """Divide the weights of a layer's experts."""
    found: Weights = {}
    for path, array in weights.items():
        layer, stacked, name = path.partition(_EXPERTS)
        found |= {f"{layer}.experts.{n}.{name}": each for n, each in enumerate(array)} if stacked else {path: array}
    return found


def _fused_experts(transposed: bool) -> Change:
    """Join two projections of all experts of a layer."""

    def change(weights: Weights) -> Weights:
        found = {path: array for path, array in weights.items() if _EXPERTS not in path}
        for layer in sorted({path.partition(_EXPERTS)[0] for path in weights if _EXPERTS in path}):
            gate, up, down = (weights[f"{layer}{_EXPERTS}{each}_proj.weight"] for each in ("gate", "up", "down"))
            fused = {"gate_up_proj": mx.concatenate([gate, up], axis=1), "down_proj": down}
            for name, array in fused.items():
                found[f"{layer}.experts.{name}"] = mx.contiguous(array.swapaxes(1, 2)) if transposed else array
        return found

    return change


def _norms_around_zero(weights: Weights) -> Weights:
    return {path: array - 1 if _NORMS.search(path) else array for path, array in weights.items()}


def _with_draft_layer(*names: str) -> Change:
    """Add weights of a layer that predicts further tokens, which is not used."""
    return lambda weights: {**weights, **{name: mx.ones((4, 4)) for name in names}}


def _fp8(block: bool) -> Change:
    """Quantise the linear layers of the language model as FP8 checkpoints do.

    Args:
        block: with a scale for each block of 128 × 128 weights; otherwise, for each matrix.
    """

    def change(weights: Weights) -> Weights:
        found = dict(weights)
        for path in (path for path in weights if _FP8.search(path)):
            scale = mx.abs(weights[path]).max() / 400
            found[path] = mx.to_fp8(weights[path] / scale)
            found[f"{path}_scale_inv"] = scale.reshape(1, 1) if block else scale
            if not block:
                found[path.replace(".weight", ".activation_scale")] = mx.array(1.0)
        return found

    return change


def _separate_attention(weights: Weights) -> Weights:
    """Divide the image encoder's projections of queries, keys and values."""
    found: Weights = {}
    for path, array in weights.items():
        parts = dict(zip("qkv", mx.split(array, 3), strict=True)) if ".qkv." in path else None
        found |= {path.replace(".qkv.", f".{k}_proj."): v for k, v in parts.items()} if parts else {path: array}
    return found


_TEXT: Final = ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"))
_VISUAL: Final = _renamed(*_TEXT, (r"^vision_tower", "model.visual"))
_MTP: Final = _with_draft_layer("mtp.fc.weight", "mtp.layers.0.input_layernorm.weight")
_QWEN2: Final = _renamed((r"^language_model\.", ""), (r"^vision_tower", "visual"))
_IDEFICS: Final = _renamed(
    _TEXT[1], (r"^language_model\.", "model.text_model."), (r"^(vision_model|connector)\.", r"model.\1.")
)
_PIXTRAL: Final = _renamed((r"^vision_tower\.vision_model", "vision_tower"))
_NESTED_PIXTRAL: Final = _renamed(
    *_TEXT, (r"^vision_tower\.vision_model", "model.vision_tower"), (r"^multi", "model.multi")
)
_ENCODER_PIXTRAL: Final = _renamed(
    *_TEXT,
    (r"^vision_tower\.vision_model", "model.vision_encoder"),
    (r"^multi_modal_projector", "model.vision_projection"),
)
_OTHER_PARTS: Final = r"^(vision_tower|embed_vision|multi_modal_projector|spatial_|layerwise_|image_newline)"
_NESTED: Final = _renamed(*_TEXT, (_OTHER_PARTS, r"model.\1"))
_DEEPSEEK: Final = _renamed(
    (r"^language_model\.", ""),
    (r"^vision_model\.qwen2_encoder\.(layers|norm)", r"model.qwen2_model.model.model.\1"),
    (r"^vision_model\.qwen2_encoder\.(query_\d+)$", r"model.qwen2_model.\1.weight"),
    (r"^view_separator", "model.view_seperator"),  # as published
    (r"^(vision_model|sam_model|projector|image_newline)", r"model.\1"),
)

_LAYOUTS: Final[Mapping[str, Sequence[Sequence[Change]]]] = {
    **{name: [[_QWEN2]] for name in ("qwen2_vl", "qwen2_5_vl")},
    **{name: [[_VISUAL]] for name in ("qwen3_vl", "glm4v")},
    "glm_ocr": [[_VISUAL, _with_draft_layer("model.language_model.layers.16.eh_proj.weight")]],
    "qwen3_vl_moe": [[_VISUAL, _fused_experts(transposed=True)]],
    "qwen3_5": [[_VISUAL, _norms_around_zero, _MTP]],
    "qwen3_5_moe": [[_VISUAL, _norms_around_zero, _MTP, _fused_experts(transposed=False)]],
    "glm4v_moe": [[_VISUAL, _single_experts, _with_draft_layer("model.language_model.layers.2.eh_proj.weight")]],
    "pixtral": [[_PIXTRAL], [_ENCODER_PIXTRAL]],
    **{name: [[_PIXTRAL], [_NESTED_PIXTRAL], [_ENCODER_PIXTRAL]] for name in ("mistral3", "ministral3")},
    "lfm2_vl": [
        [_renamed(_TEXT[0], (r"^vision_tower\.", "model.vision_tower.vision_model."), (r"^multi", "model.multi"))]
    ],
    **{name: [[_IDEFICS]] for name in ("idefics3", "smolvlm")},
    "internvl": [[], [_renamed((r"^language_model\.", "language_model.model."))]],
    **{name: [[]] for name in ("internvl_chat", "llava", "llava_next", "gemma3")},
    "kimi_vl": [
        [
            _renamed(
                (r"^vision_tower\.blocks\.(\d+)\.attn\.", r"vision_tower.encoder.blocks.\1."),
                (r"^vision_tower\.(blocks|final)", r"vision_tower.encoder.\1"),
            ),
            _single_experts,
        ]
    ],
    **{name: [[_NESTED]] for name in ("gemma4", "gemma4_e")},
    "deepseekocr": [[_DEEPSEEK, _single_experts]],
    "deepseekocr_2": [[_DEEPSEEK, _single_experts]],
    "granite4_vision": [[_NESTED, _renamed((r"\.in_proj\.(weight|bias)$", r".in_proj_\1"))]],
    "nemotron_h_nano_omni": [[_renamed((r"^mlp1\.layers\.", "mlp1."))]],
    "paddleocr_vl": [
        [
            _separate_attention,
            _renamed(
                (r"^visual\.projector", "mlp_AR"),
                (r"^visual\.layers", "visual.vision_model.encoder.layers"),
                (r"^visual\.", "visual.vision_model."),
                (r"^language_model\.", ""),
            ),
        ]
    ],
}

LAYOUTS: Final[Mapping[str, Sequence[Sequence[Change]]]] = {
    name: [[*changes, _channels_first] for changes in layouts] for name, layouts in _LAYOUTS.items()
}
"""The changes of each layout in which a model is published, by the model's name in `VISION_MODELS`."""

FP8: Final[Mapping[str, tuple[Sequence[Change], Mapping[str, object]]]] = {
    name: (
        [_fp8(block), *_LAYOUTS[name][-1], _channels_first],
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128] if block else None},
    )
    for name, block in (("qwen3_vl", True), ("ministral3", False))
}
"""Changes and `quantization_config` of FP8 checkpoints."""
