"""Matches adapters with the layers of a model: which layer each pair of matrices belongs to, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from shared.models.adapters import SETTINGS_FILE, Adapter, AdapterLayer, read_adapter
from shared.models.folder import ModelError
from worker.models.text_half import without_prefix
from worker.runner.adapters.layers import EMBEDDINGS, EXPERT_GROUPS, EXPERTS, LINEAR
from worker.runner.adapters.table import TableShape
from worker.runner.prefix.files import fingerprint


@dataclass(frozen=True, slots=True)
class Fitted:
    """An adapter that fits the model.

    Attributes:
        digest: changes with the adapter's files; part of the keys of its rows' prefixes.
        layers: by layer of the model.
    """

    name: str
    adapter: Adapter
    digest: str
    layers: Mapping[str, AdapterLayer]


class ModelLayers:
    """The layers of a model that adapters may change.

    Names are compared without the part that only multimodal models have, so an adapter that was trained with a whole
    multimodal model fits its language model, and the other way round.
    """

    def __init__(self, layers: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
        self._layers = layers
        self._groups = groups

    @classmethod
    def of(cls, model: Any) -> Self:
        """Find the layers of a model."""
        modules = {_short_name(path): _base(module) for path, module in model.named_modules()}
        return cls(modules, {path: each for path, each in modules.items() if isinstance(each, EXPERT_GROUPS)})

    def __getitem__(self, path: str) -> Any:
        return self._layers[path]

    def group(self, path: str) -> Any | None:
        """Return the group of experts that a layer belongs to."""
        return self._groups.get(path.rpartition(".")[0])

    def fit(self, name: str, folder: Path, max_rank: int) -> Fitted:
        """Read an adapter's headers, and check that it fits.

        Raises:
            ModelError: it cannot be used. The text has no path, because API callers see it.
        """
        adapter = read_adapter(folder, max_rank)
        layers = {_short_name(layer.path): layer for layer in adapter.layers}
        for path, layer in layers.items():
            self._check(path, layer)
        return Fitted(name, adapter, fingerprint(folder, "", SETTINGS_FILE)[:16], layers)

    def shape(self, path: str, rank: int) -> TableShape:
        """Return the size of a table for a layer."""
        module = self._layers[path]
        if isinstance(module, EXPERTS):
            return TableShape(module.input_dims, module.output_dims, rank, module.num_experts)
        columns = module.weight.shape[1]
        if hasattr(module, "scales"):
            columns = columns * 32 // module.bits
        rows = module.weight.shape[0]
        return TableShape(rows, columns, rank) if isinstance(module, EMBEDDINGS) else TableShape(columns, rows, rank)

    def _check(self, path: str, layer: AdapterLayer) -> None:
        module = self._layers.get(path)
        if module is None:
            raise ModelError(f"the model has no layer {path}; the adapter was trained for another base model")
        if not isinstance(module, (*LINEAR, *EMBEDDINGS, *EXPERTS)):
            raise ModelError(f"it changes {path}, but adapters of layers of this type are not supported")
        if isinstance(module, EXPERTS) and self.group(path) is None:
            raise ModelError(f"it changes {path}, but adapters of these experts are not supported")
        expected, found = self.shape(path, layer.rank), _shape(layer)
        if found != expected:
            raise ModelError(
                f"{path} has {_describe(expected)} in the model, but {_describe(found)} in the adapter, which was "
                "trained for another base model"
            )


def _short_name(path: str) -> str:
    while (shorter := without_prefix(path)) != path:
        path = shorter
    return path


def _base(module: Any) -> Any:
    """Return the layer itself if an adapter of the catalog entry changes it for all requests."""
    match module:
        case LoRALinear() | LoRASwitchLinear():
            return module.linear
        case LoRAEmbedding():
            return module.embedding
    return module


def _shape(layer: AdapterLayer) -> TableShape:
    if layer.per_expert:
        experts, rank, inputs = layer.a_shape
        return TableShape(inputs, layer.b_shape[1], rank, experts)
    return TableShape(layer.a_shape[0], layer.b_shape[1], layer.rank)


def _describe(shape: TableShape) -> str:
    experts = f"{shape.experts} experts with " if shape.experts > 1 else ""
    return f"{experts}{shape.inputs} inputs and {shape.outputs} outputs"


def table_shapes(layers: ModelLayers, adapters: Iterable[Fitted]) -> dict[str, TableShape]:
    """Return the size of the table of each layer that any of the adapters changes, padded to the largest rank."""
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            ranks[path] = max(layer.rank, ranks.get(path, 0))
    return {path: layers.shape(path, rank) for path, rank in ranks.items()}
