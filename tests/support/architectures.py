"""Tiny random models of the architectures of mlx-lm."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from tests.support.architecture_configs import VOCABULARY, config
from worker.runner.batching.proof import proving
from worker.runner.batching.support import BatchingSupport


def make(name: str, dtype: mx.Dtype = mx.float32, bits: int | None = None, **more: Any) -> Any:
    """A model with random weights.

    Args:
        bits: number of bits to pack the matrices to.
        more: of the configuration.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    arguments = config(name) | more
    arguments["text_config"] |= more
    model = module.Model(module.ModelArgs.from_dict(arguments))
    # Constant arrays would hide mistakes, and so would matrices that change little.
    model.update(tree_map(lively, model.parameters()))
    if name == "baichuan_m1":  # it does this whenever it is loaded
        head = model.lm_head
        head.weight = head.weight / (mx.linalg.norm(head.weight, axis=-1, keepdims=True) + 1e-7)
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=_can_be_packed)  # type: ignore[attr-defined]
    mx.eval(model.parameters())
    return model


def _can_be_packed(_path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def lively(array: mx.array) -> mx.array:
    if array.ndim == 2:
        return array * 2 + 0.02 * mx.random.normal(array.shape)
    return array + 0.1 * mx.random.normal(array.shape) if mx.issubdtype(array.dtype, mx.floating) else array


_NO_MODELS = (
    *("__init__", "activations", "base", "bitlinear_layers", "cache", "gated_delta", "gear", "mla", "pipeline"),
    *("rope_utils", "ssm", "switch_layers"),
)
_NOT_BUILT = ("bitnet", "muse_spark", "olmo", "prism_hadamard_qwen35")
"""They need Metal, another package, or weights packed by a tool."""


def names() -> list[str]:
    """All architectures that can be made here."""
    found = (module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return sorted(name for name in found if name not in _NO_MODELS and name not in _NOT_BUILT)


def measured(model: Any, passes: list[None] | None = None) -> BatchingSupport:
    """What a proof finds; `passes` grows by one for each pass."""
    running = proving(model, VOCABULARY, spare_bytes=2**32)
    while True:
        try:
            step = next(running)
        except StopIteration as end:
            found: BatchingSupport = end.value
            return found
        if passes is not None:
            passes.append(step)


def write_folder(name: str, folder: Path, tiny_model_path: Path) -> Path:
    """Write a tiny model of an architecture with the tokenizer of the tiny llama."""
    folder.mkdir()
    for file in tiny_model_path.glob("*token*"):
        shutil.copy(file, folder)
    vocabulary = json.loads((tiny_model_path / "config.json").read_text())["vocab_size"]
    options = {"vocab_size": vocabulary, "max_position_embeddings": 8192}
    own = config(name) | options
    (folder / "config.json").write_text(json.dumps(own | {"text_config": own["text_config"] | options}))
    weights = dict(tree_flatten(make(name, **options).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
