"""LoRA adapters with random weights, in the formats of mlx-lm and of PEFT."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from shared.jobs.request import Request
from shared.models.catalog import CatalogModel
from shared.settings import Settings
from tests.support.runner import GREEDY
from worker.runner.adapters.slots import AdapterSlots
from worker.runner.base import Row
from worker.runner.loading import load
from worker.runner.model_runner import MLXRunner

T = TypeVar("T")


def write_adapter(
    base: Path, folder: Path, *, seed: int = 0, rank: int = 4, layers: int = 2, keys: Iterable[str] | None = None
) -> Path:
    """Write an adapter for a model folder in mlx-lm's format.

    Args:
        layers: number of layers, from the last, that it changes.
        keys: names of what it changes in these layers, and of layers outside them; None: all linear layers.
    """
    model, _ = load_model(base)
    write_for(model, folder, seed=seed, rank=rank, layers=layers, keys=keys)
    return folder


def write_for(
    model: Any, folder: Path, *, seed: int = 0, rank: int = 4, layers: int = 2, keys: Iterable[str] | None = None
) -> None:
    """Do the same for a loaded model, which gets the adapter's layers and weights."""
    parameters: dict[str, Any] = {"rank": rank, "scale": 10.0, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = list(keys)
    linear_to_lora_layers(model, layers, dict(parameters))
    random = mx.random.key(seed)
    weights = {}
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in arrays.items():
        if name.endswith(("lora_a", "lora_b")):
            random, key = mx.random.split(random)
            weights[name] = 0.1 * mx.random.normal(array.shape, key=key)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


def write_as_peft(adapter: Path, folder: Path) -> Path:
    """Write an adapter of mlx-lm's format in PEFT's."""
    parameters = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    weights: dict[str, mx.array] = mx.load(str(adapter / "adapters.safetensors"))  # type: ignore[assignment]
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    renamed = {}
    for name, array in weights.items():
        path, _, end = name.rpartition(".")
        renamed[f"base_model.model.{path}.{names[end]}"] = mx.contiguous(array.T)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), renamed)
    rank = parameters["rank"]
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": parameters["scale"] * rank,
        "bias": "none",
        "modules_to_save": None,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def loading(model: CatalogModel, **settings: Any) -> Generator[float, None, MLXRunner]:
    """Load a catalog model without prefixes on disk."""
    return load(Settings(model_path=model.path, **{"prefix_disk_bytes": 0, **settings}), model)


def finished(steps: Generator[Any, None, T]) -> T:
    """Run steps; return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def runner_with(base: Path, adapters: dict[str, Path], **settings: Any) -> MLXRunner:
    """Load a model folder whose catalog entry has these adapters."""
    return finished(loading(CatalogModel("m", base, "text", adapters=adapters), **settings))


def load_all(adapters: AdapterSlots, names: Iterable[str]) -> dict[str, int]:
    """Load adapters for rows that name them; return their slots."""
    waiting = [row_with(name, uid, [1], 2) for uid, name in enumerate(names)]
    assert [adapters.enter(row) for row in waiting] == [None] * len(waiting)
    slots: dict[str, int] = {}
    while len(slots) < len(waiting):
        if (read := adapters.next_read()) is not None:
            read.result()
        adapters.advance()
        assert not adapters.take_failures()
        slots |= {row.request.adapter or "": row.adapter_slot for row in adapters.ready()}
    return slots


def row_with(adapter: str | None, uid: int, prompt: Iterable[int], max_new_tokens: int = 12, **fields: Any) -> Row:
    """Return a greedy row that names an adapter, with log-probabilities."""
    request = Request("m", max_new_tokens, GREEDY, logprobs=5, adapter=adapter)
    row = Row(uid, request, tuple(prompt), 0, max_new_tokens)
    return replace(row, **fields)
