"""Reads folders of LoRA weights that requests can select (`adapter`). Only headers are read, never the weights.

Two formats are known:

- mlx-lm's: `adapter_config.json` with `lora_parameters`, and `adapters.safetensors`;
- PEFT's: `adapter_config.json` with `lora_alpha`, and `adapter_model.safetensors`, with transposed matrices.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.models.folder import ModelError, check_whole, read_object, safetensors_header

ADAPTER_NAME: Final = r"^[A-Za-z0-9][\w.-]{0,127}$"
SETTINGS_FILE: Final = "adapter_config.json"
_MLX_FILE: Final = "adapters.safetensors"
_PEFT_FILE: Final = "adapter_model.safetensors"
_SUFFIXES: Final = (
    (".lora_a", ".lora_b"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
"""Ends of the names of a layer's two matrices: mlx-lm's, and PEFT's of linear layers and of embeddings."""
_PEFT_PREFIX: Final = "base_model.model."


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """What an adapter adds to a layer: `scale * (x @ a) @ b`.

    Attributes:
        path: name of the layer in the model.
        a, b: names of the matrices in the file.
        a_shape, b_shape: shapes of the matrices, [inputs, rank] and [rank, outputs] after transposing PEFT's. In
            mlx-lm's files, layers with experts have [experts, rank, inputs] and [experts, outputs, rank].
    """

    path: str
    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    scale: float

    @property
    def per_expert(self) -> bool:
        """Whether the layer has a pair of matrices for each expert."""
        return len(self.a_shape) == 3

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a_shape[1]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A folder with LoRA weights.

    Attributes:
        weights: the file with the matrices.
        transposed: whether the matrices are stored transposed, as PEFT does.
        dtypes: types of the matrices, in the names of safetensors files.
    """

    folder: Path
    weights: Path
    layers: tuple[AdapterLayer, ...]
    transposed: bool
    dtypes: frozenset[str]

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(layer.rank for layer in self.layers)


def adapter_folders(folder: Path) -> dict[str, Path]:
    """Return the adapters in the subfolders of a folder, by name. Subfolders without settings are ignored."""
    found = sorted(path.parent for path in folder.glob(f"*/{SETTINGS_FILE}"))
    return {path.name: path for path in found if re.fullmatch(ADAPTER_NAME, path.name)}


def read_adapter(folder: Path, max_rank: int) -> Adapter:
    """Read what an adapter's files declare.

    Raises:
        ModelError: the adapter cannot be used. The text has no path, because API callers see it.
    """
    try:
        return _read(folder, max_rank)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), folder.name)) from error
    except OSError as error:
        raise ModelError(f"its files cannot be read: {error.strerror}") from error


def _read(folder: Path, max_rank: int) -> Adapter:
    settings = read_object(folder / SETTINGS_FILE)
    is_peft = "peft_type" in settings
    check = _check_peft if is_peft else _check_mlx
    check(settings)
    weights = folder / (_PEFT_FILE if is_peft else _MLX_FILE)
    check_whole(weights)
    header = safetensors_header(weights)
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    layers = tuple(_layers(tensors, settings, transposed=is_peft))
    if not layers:
        raise ModelError(f"{weights.name} has no LoRA weights")
    adapter = Adapter(folder, weights, layers, is_peft, frozenset(str(each["dtype"]) for each in tensors.values()))
    if adapter.rank > max_rank:
        raise ModelError(f"its rank is {adapter.rank}, more than the limit of {max_rank} (ADAPTER_MAX_RANK)")
    return adapter


def _check_mlx(settings: Mapping[str, Any]) -> None:
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        names = {"dora": "a DoRA", "full": "a full fine-tuning"}
        what = names.get(str(kind), f"of type {json.dumps(kind)[:40]}")
        raise ModelError(f"it is {what}; only LoRA is supported")
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict) or not _is_number(parameters.get("scale")):
        raise ModelError(f"{SETTINGS_FILE} has no lora_parameters with a scale")


def _check_peft(settings: Mapping[str, Any]) -> None:
    if settings["peft_type"] != "LORA":
        raise ModelError(f"its peft_type is {json.dumps(settings['peft_type'])[:40]}; only LORA is supported")
    if not _is_number(settings.get("lora_alpha")):
        raise ModelError(f"{SETTINGS_FILE} has no lora_alpha")
    for name, neutral in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("alpha_pattern", {})):
        value = settings.get(name)
        if value and value != neutral:
            raise ModelError(f"its {SETTINGS_FILE} sets {name}, which is not supported")


def _layers(
    tensors: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], *, transposed: bool
) -> Iterator[AdapterLayer]:
    pairs: dict[str, dict[int, str]] = {}
    for name in tensors:
        path, index = _split(name)
        pairs.setdefault(path, {})[index] = name
    for path, names in pairs.items():
        if len(names) < 2:
            raise ModelError(f"{path} has only one of its two matrices")
        a_shape, b_shape = (_shape(tensors[names[index]], path, transposed=transposed) for index in (0, 1))
        _check_shapes(path, a_shape, b_shape)
        scale = _scale(settings, a_shape[1])
        yield AdapterLayer(path.removeprefix(_PEFT_PREFIX), names[0], names[1], a_shape, b_shape, scale)


def _split(name: str) -> tuple[str, int]:
    """Return the layer of a matrix, and 0 for its `a` or 1 for its `b`."""
    for suffixes in _SUFFIXES:
        for index, suffix in enumerate(suffixes):
            if name.endswith(suffix):
                return name.removesuffix(suffix), index
    raise ModelError(f"it has the weight {name[:200]!a}, which is not LoRA's")


def _shape(tensor: Mapping[str, Any], path: str, *, transposed: bool) -> tuple[int, ...]:
    shape = tensor.get("shape")
    valid = isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)
    if not valid or tensor.get("dtype") not in ("F32", "F16", "BF16"):
        raise ModelError(f"the matrices of {path} have an invalid shape or type")
    return tuple(reversed(shape or ())) if transposed else tuple(shape or ())


def _check_shapes(path: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    linear = len(a) == len(b) == 2 and a[1] == b[0]
    experts = len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]
    if not linear and not experts:
        raise ModelError(f"the matrices of {path} do not fit together: {list(a)} and {list(b)}")


def _scale(settings: Mapping[str, Any], rank: int) -> float:
    if "peft_type" not in settings:
        return float(settings["lora_parameters"]["scale"])
    return float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
