"""Folders of tiny random models: quantised in every way that mlx-lm has, in shards, with adapters."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model

from tests.support.architecture_configs import config
from tests.support.architectures import make
from tests.support.tokenizers import byte_tokenizer

Predicate: TypeAlias = Callable[[str, Any], "bool | dict[str, Any]"]


class Unsupported(Exception):
    """mlx-lm or this device cannot do something with an architecture, so there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Arguments of mlx-lm's `quantize_model`."""

    mode: str = "affine"
    bits: int | None = None
    predicate: Predicate | None = None


def _mixed(path: str, _module: Any) -> bool | dict[str, Any]:
    """Keep one layer, and quantise another and the output with more bits."""
    if ".0." in path:
        return False
    more = ".1." in path or "lm_head" in path
    return {"group_size": 32, "bits": 8 if more else 4, "mode": "affine"}


QUANTISATIONS: Final[Mapping[str, Quantisation]] = {
    **{f"{bits} bits": Quantisation(bits=bits) for bits in (2, 3, 4, 5, 6, 8)},
    **{mode: Quantisation(mode) for mode in ("mxfp4", "mxfp8", "nvfp4")},
    "mixed": Quantisation(bits=4, predicate=_mixed),
}


def write_folder(folder: Path, model: Any, own_config: Mapping[str, Any], shards: int = 1) -> Path:
    """Write a model folder with a tokenizer of one token per byte."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(own_config))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    weights = dict(tree_flatten(model.parameters()))
    if shards == 1:
        _save(folder / "model.safetensors", weights)
        return folder
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    parts = {file: dict(list(weights.items())[n::shards]) for n, file in enumerate(files)}
    for file, part in parts.items():
        _save(folder / file, part)
    index = {"metadata": {}, "weight_map": {path: file for file, part in parts.items() for path in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _save(file: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})


def quantised(name: str, quantisation: Quantisation) -> tuple[Any, dict[str, Any]]:
    """Return a quantised model and its config.json.

    Raises:
        Unsupported: mlx-lm cannot quantise it so, or this device cannot run it.
    """
    model = make(name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, own_config = quantize_model(
                model, config(name), 32 if quantisation.mode == "affine" else None, quantisation.bits,
                mode=quantisation.mode, quant_predicate=quantisation.predicate,
            )  # fmt: skip
        mx.eval(model(mx.array([[1, 2, 3]])))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(str(error).splitlines()[0]) from error
    return model, own_config


def adapted(name: str, folder: Path) -> Any:
    """Write a folder of LoRA weights, and return an architecture's model with them. Raises like `adapt`."""
    return adapt(make(name), folder)


def adapt(model: Any, folder: Path) -> Any:
    """Write a folder of LoRA weights, and return the model with them.

    Raises:
        Unsupported: mlx-lm has no adapters for it.
    """
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0},
    }
    try:
        linear_to_lora_layers(model, 2, dict(settings["lora_parameters"]))  # type: ignore[call-overload]
        mx.eval(model(mx.array([[1, 2, 3]])))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(str(error).splitlines()[0]) from error
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = {
        path: 0.1 * mx.random.normal(array.shape)
        for path, array in parameters.items()
        if path.endswith(("lora_a", "lora_b"))
    }
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    folder.mkdir(parents=True)
    _save(folder / "adapters.safetensors", weights)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return model
