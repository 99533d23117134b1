"""Random weights of any shape, written shard by shard, so that a model may be larger than memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from scripts.model_files.weights import save_weights

SHARD_BYTES = 2**30
SEED = 20
_SCALES: Final = {
    **dict.fromkeys(("merger.mlp.2.weight", "merger.linear_fc2.weight", "mm_input_projection_weight"), 16),
    **dict.fromkeys(("self_attn.q_proj.weight", "self_attn.k_proj.weight"), 8),
}
"""By the end of a name, factors for the weights of vision models. With unscaled random weights, attention averages over
all tokens, so the output would hardly depend on the image."""


def random_weights(config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return all weights by name, as mlx-lm or mlx-vlm initialises them. They are lazy, and the same each time."""
    mx.random.seed(SEED)
    model = _vision_model(config) if "vision_config" in config else _text_model(config)
    dtype = getattr(mx, config["torch_dtype"])
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {name: array.astype(dtype) for name, array in weights.items()}


def _text_model(config: Mapping[str, Any]) -> Any:
    library: Any = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    return library.Model(library.ModelArgs.from_dict(dict(config)))


def _vision_model(config: Mapping[str, Any]) -> Any:
    from mlx_vlm.utils import update_module_configs

    library: Any = importlib.import_module(f"mlx_vlm.models.{config['model_type']}")
    values = dict(config)  # the library modifies it
    model_config = library.ModelConfig.from_dict(values)
    modules = ["text", "vision"]
    model: Any = library.Model(update_module_configs(model_config, library, values, modules))  # type: ignore[no-untyped-call]
    model.update(tree_map_with_path(_scaled, model.parameters()))
    return model


def _scaled(name: str, array: mx.array) -> mx.array:
    if name.startswith("vision_tower.") and "self_attn" in name:
        return array
    return next((array * factor for end, factor in _SCALES.items() if name.endswith(end)), array)


def write_random_weights(folder: Path, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Write random weights as safetensors files of at most about `shard_bytes`, with an index if there are several.

    Raises:
        ModelError: the disk is full.
    """
    weights = random_weights(config)
    total = sum(array.nbytes for array in weights.values())
    shards = list(_shards(weights, shard_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        # Written weights are released, so only one shard is in memory.
        save_weights(folder / file, {name: weights.pop(name) for name in names})
        mx.clear_cache()
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def size(config: Mapping[str, Any]) -> int:
    """Return the size of all weights in bytes."""
    return sum(array.nbytes for array in random_weights(config).values())


def _shards(weights: Mapping[str, mx.array], shard_bytes: int) -> Iterator[list[str]]:
    """Split the names into shards of at most `shard_bytes`."""
    names: list[str] = []
    shard_size = 0
    for name, array in weights.items():
        if names and shard_size + array.nbytes > shard_bytes:
            yield names
            names, shard_size = [], 0
        names.append(name)
        shard_size += array.nbytes
    yield names
