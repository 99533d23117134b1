"""Random weights of any shape, made and written file by file: a model may be larger than the memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from scripts.model_files.weights import save_weights

SHARD_BYTES = 2**30
SEED = 20
_LOUD, _SHARP = 16, 8
"""Attention of random weights averages over all tokens: what a vision model says would hardly depend on the image."""


def random_weights(config: Mapping[str, Any]) -> dict[str, mx.array]:
    """All weights by name, as mlx-lm or mlx-vlm initialises them; nothing is computed yet. The same each time."""
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
    given = dict(config)  # the library adds to it
    whole = library.ModelConfig.from_dict(given)
    modules = ["text", "vision"]
    model = library.Model(update_module_configs(whole, library, given, modules))  # type: ignore[no-untyped-call]
    model.vision_tower.merger.mlp[-1].weight *= _LOUD
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= _SHARP
        layer.self_attn.k_proj.weight *= _SHARP
    return model


def write_random_weights(folder: Path, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Write them as safetensors, in files of about `shard_bytes`, with an index when there are several.

    Raises:
        ModelError: the disk is full.
    """
    weights = random_weights(config)
    total = sum(array.nbytes for array in weights.values())
    shards = list(_shards(weights, shard_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        # What is written is let go of: a shard is all that is ever computed and held.
        save_weights(folder / file, {name: weights.pop(name) for name in names})
        mx.clear_cache()
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def size(config: Mapping[str, Any]) -> int:
    """Bytes of all weights."""
    return sum(array.nbytes for array in random_weights(config).values())


def _shards(weights: Mapping[str, mx.array], shard_bytes: int) -> Iterator[list[str]]:
    """Names in their order, cut where a file would become too large."""
    names: list[str] = []
    held = 0
    for name, array in weights.items():
        if names and held + array.nbytes > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += array.nbytes
    yield names
