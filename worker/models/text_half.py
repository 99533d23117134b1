"""Loads text models with mlx-lm, also from multimodal folders that it does not know: their language model alone.

Such a folder describes its language model in a section of config.json, and the names of its weights have a prefix. The
architecture must be one of mlx-lm's, and the weights must match it exactly, so a wrong guess is refused.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils
from transformers import AutoConfig

from shared.models.folder import ModelError

Loaded: TypeAlias = tuple[Any, Any, dict[str, Any]]
"""The model, its tokenizer, and the configuration."""
Classes: TypeAlias = Callable[[dict[str, Any]], tuple[Any, Any]]
"""Returns the classes of a model and of its arguments, given the configuration."""

_SECTIONS: Final = ("text_config", "llm_config", "language_config", "thinker_config")
"""Sections of config.json that describe the language model. The last one has a `text_config` of its own."""
_DEEPSEEK_OCR: Final = frozenset(("deepseekocr", "deepseekocr_2"))
"""Types whose section calls its architecture `deepseek_v2`, but that compute what mlx-lm's `deepseek` computes."""
_DEEPSEEK: Final[Mapping[str, Any]] = {
    "qk_nope_head_dim": 0,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
"""Values of the section for which this is true. Folders with other values are refused."""
_ARCHITECTURES: Final = {
    **dict.fromkeys(_DEEPSEEK_OCR, "deepseek"),
    "dots_ocr": "qwen2",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "glm_ocr_text": "glm4",
    "granite4_vision_text": "granitemoehybrid",
    "lfm2_vl": "lfm2",
    "llava_qwen2": "qwen2",
    "paddleocr_vl": "llama",
    "phi3_v": "phi3",
    "qwen3_omni_moe_text": "qwen3_moe",
    "smolvlm": "llama",
}
"""mlx-lm's architectures for language models whose own type it does not know."""
_TRANSFORMERS_DEFAULTS: Final = frozenset(("llava_next",))
"""Types whose sections leave out values that are the defaults of transformers, which mlx-vlm does not know."""
_ROPE: Final = ("rope_theta", "partial_rotary_factor")
"""Values that later versions of transformers write into `rope_parameters`."""
_DIFFERENT: Final = frozenset(("colidefics3", "deepseek_vl_v2", "paligemma", "plamo2vl", "unlimited_ocr"))
"""Types whose text mlx-lm would compute in another way: other rotary positions, or prompts that are read both ways."""
_PREFIX: Final = re.compile(r"(?:model\.|thinker\.)*(?:language_model|text_model|language|llm)\.|thinker\.")
_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")
_ANY_QUANTISATION: Final = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
"""Lets mlx-lm find how each weight is quantised if config.json does not state it, as in FP8 checkpoints.

mlx-vlm converts those to these values.
"""
_ADAPTER: Final = "adapters.safetensors"
_OTHER_HALF: Final = re.compile(r"vision|visual|image|audio|sam_model|vpm|projector|connector|view_sep|qwen2_model")


def load(
    folder: Path,
    tokenizer_config: dict[str, Any],
    *,
    adapter: Path | None,
    lazy: bool,
    weights: dict[str, Any] | None = None,
) -> Loaded:
    """Load a text model, or the language model of a multimodal folder.

    Args:
        adapter: a folder of LoRA weights to apply.
        lazy: read the weights only when they are evaluated.
        weights: the weights of the language model, with the names of mlx-vlm's models; the dictionary is emptied. None:
            read them from the folder.

    Raises:
        Exception: of any type, if the folder is broken or its architecture is not supported.
    """
    config = utils.load_config(folder)
    known = is_known(config) or not _is_multimodal(config)
    if known and weights is None:
        return utils.load(  # type: ignore[return-value]
            str(folder), tokenizer_config, adapter_path=str(adapter) if adapter else None, lazy=lazy, return_config=True
        )
    settings, classes = (config, utils._get_classes) if known else _half_of(folder, config)  # noqa: SLF001
    if weights is not None:
        classes = _with_weights(weights, classes)
        settings = _with_tied_output(weights, settings)
        if any(path.endswith(".scales") for path in weights) and "quantization" not in settings:
            settings = {**settings, "quantization": _ANY_QUANTISATION}
    model, config = utils.load_model(folder, lazy=lazy, model_config=settings, get_model_classes=classes)
    if adapter is not None:
        _load_adapter(model, adapter)
    eos = config.get("eos_token_id")
    tokenizer = utils.load_tokenizer(folder, tokenizer_config, eos_token_ids=eos)  # type: ignore[no-untyped-call]
    return model, tokenizer, config


def _load_adapter(model: Any, adapter: Path) -> None:
    """Load LoRA weights, also those that were trained with the whole multimodal model."""
    weights: Any = mx.load(str(adapter / _ADAPTER))
    with TemporaryDirectory() as folder:  # mlx-lm reads weights only from a folder
        shutil.copy(adapter / "adapter_config.json", folder)
        mx.save_safetensors(f"{folder}/{_ADAPTER}", _text_weights(model, weights))
        utils.load_adapters(model, folder)
    model.eval()


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm itself reads folders of this type, with or without a vision half."""
    text = config.get("text_config")
    if config["model_type"] == "llava" and isinstance(text, Mapping) and "hidden_size" not in text:
        return False  # mlx-lm takes it for a Pixtral, which states all sizes
    if config["model_type"] == "kimi_vl":
        return False  # mlx-lm does not split the projections of its attention
    try:
        utils._get_classes(dict(config))  # noqa: SLF001 - there is no other way
    except ValueError:
        return False
    return True


def _is_multimodal(config: Mapping[str, Any]) -> bool:
    return config["model_type"] in _ARCHITECTURES or any(isinstance(config.get(name), dict) for name in _SECTIONS)


def _half_of(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Classes]:
    """Return the configuration and the classes of the language model of a folder that mlx-lm does not know."""
    text, kind = _text_config(config), config["model_type"]
    if kind in _DIFFERENT or not is_known(text):
        raise ModelError(
            f"{folder}: neither the images nor the text of model_type {kind!r} are supported"
            + (f": mlx-lm has no architecture {text['model_type']!r}." if kind not in _DIFFERENT else ".")
        )
    if kind in _DEEPSEEK_OCR and (
        other := [name for name, value in _DEEPSEEK.items() if text.get(name, value) != value]
    ):
        raise ModelError(f"{folder}: model_type {kind!r} is not supported with this value of {other[0]}")
    return text, _text_classes


def _with_tied_output(weights: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with `tie_word_embeddings` as the weights show it: whether there is no output layer.

    config.json often leaves this out, and the default of mlx-lm's `llama` differs from that of transformers.
    """
    tied = {"tie_word_embeddings": "language_model.lm_head.weight" not in weights}
    sections = {name: {**settings[name], **tied} for name in _SECTIONS if isinstance(settings.get(name), dict)}
    return {**settings, **sections, **tied}


def _with_weights(weights: dict[str, Any], classes: Classes) -> Classes:
    """Return a function like `classes`, whose models take these weights instead of those in the folder's files."""

    def given_classes(config: dict[str, Any]) -> tuple[Any, Any]:
        architecture, arguments = classes(config)

        class GivenWeights(architecture):  # type: ignore[misc, valid-type]
            def sanitize(self, _files: dict[str, Any]) -> dict[str, Any]:
                given = dict(weights)
                weights.clear()  # this class lives as long as the model, which may replace its weights
                return super().sanitize(given) if hasattr(architecture, "sanitize") else given

        GivenWeights.__module__ = architecture.__module__
        return GivenWeights, arguments

    return given_classes


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as that of the language model alone."""
    kind = str(config["model_type"])
    section = next((config[name] for name in _SECTIONS if isinstance(config.get(name), dict)), config)
    section = section.get("text_config") or section
    own = kind if kind in _DEEPSEEK_OCR else section.get("model_type", kind)
    if kind in _TRANSFORMERS_DEFAULTS and section is not config:
        section = {**AutoConfig.for_model(**section).to_dict(), **section}
    defaults = _defaults(kind, config)
    nested = {name: value for name, value in (section.get("rope_parameters") or {}).items() if name in _ROPE}
    text = {**defaults, **nested, **section, "model_type": _ARCHITECTURES.get(own, own)}
    if own == "granite4_vision_text":  # all of its layers have attention, under another name
        text["layer_types"] = ["attention"] * text["num_hidden_layers"]
    if config.get("eos_token_id") is not None:  # load_config takes it from generation_config.json
        text["eos_token_id"] = config["eos_token_id"]
    if isinstance(quantization := config.get("quantization"), dict):
        text["quantization"] = {without_prefix(path): value for path, value in quantization.items()}
    return text


def _defaults(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mlx-vlm assumes where a folder states nothing: sections leave out the defaults of transformers."""
    try:
        module = importlib.import_module(f"mlx_vlm.models.{kind}")
        text = module.ModelConfig.from_dict(dict(config)).text_config
        if isinstance(text, dict):
            text = module.TextConfig.from_dict(text)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {name: value for name, value in vars(text).items() if isinstance(value, bool | int | float | str)}


def _text_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes for the language model; the model also accepts the names of a multimodal folder."""
    architecture, arguments = utils._get_classes(config)  # noqa: SLF001

    class TextHalf(architecture):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            text = _text_weights(self, weights)
            if config.get("num_nextn_predict_layers"):  # further layers predict the tokens after the next one
                text = {name: weight for name, weight in text.items() if _layer(name) < config["num_hidden_layers"]}
            sanitized = super().sanitize(text) if hasattr(architecture, "sanitize") else text
            return _split_scales(sanitized)

    TextHalf.__module__ = architecture.__module__
    return TextHalf, arguments


def _split_scales(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Finish what mlx-lm's `granitemoehybrid` does to dense layers: it splits their weights, but not the scales.

    Folders that mlx-vlm has quantised have them, and also an output layer that equals the embedding.
    """
    split: dict[str, Any] = {}
    for path, array in weights.items():
        layer, fused, kind = path.partition(".shared_mlp.")
        if not fused or kind.endswith(".weight") or f"{layer}.mlp.gate_proj.weight" not in weights:
            split[path] = array
        elif kind.startswith("input_linear."):
            name = kind.removeprefix("input_linear.")
            split[f"{layer}.mlp.gate_proj.{name}"], split[f"{layer}.mlp.up_proj.{name}"] = mx.split(array, 2)
        else:
            split[f"{layer}.mlp.down_proj.{kind.removeprefix('output_linear.')}"] = array
    redundant = ("lm_head.scales", "lm_head.biases") if "lm_head.weight" not in split else ()
    return {path: array for path, array in split.items() if path not in redundant}


def _text_weights(model: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the language model under the names that mlx-lm expects.

    Nothing of the language model is left out: a weight that the architecture lacks is an error when they are loaded.
    """
    own: dict[str, Any] = dict(tree_flatten(model.parameters()))
    top = next(path.partition(".")[0] for path in own if not path.startswith("lm_head"))
    renamed = {path: _text_name(path, top) for path in weights}
    return {name: weights[path] for path, name in renamed.items() if name is not None}


def _text_name(path: str, top: str) -> str | None:
    """Return the name of a weight in the language model; None if it belongs to another part.

    Args:
        top: the first part of the names of the language model's weights.
    """
    name = without_prefix(path)
    in_text = name.replace("model.lm_head.", "lm_head.").replace("model.model.", "model.")
    if in_text.startswith((f"{top}.", "lm_head.")):
        return None if name == path and _OTHER_HALF.search(path) else in_text
    return f"{top}.{in_text}" if name != path else None


def _layer(name: str) -> int:
    """Return the number of the layer that a weight belongs to; -1 if it belongs to none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def without_prefix(path: str) -> str:
    """Return the name of a layer or weight without the part that only multimodal models have."""
    match = _PREFIX.match(path)
    return path[match.end() :] if match else path
