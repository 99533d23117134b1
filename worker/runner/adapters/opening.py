"""Prepares a model for adapters: checks them, and reserves the memory of as many as fit."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from shared.models.folder import ModelError
from worker.runner.adapters import proof
from worker.runner.adapters.fit import Fitted, ModelLayers, table_shapes
from worker.runner.adapters.layers import adapt, restore
from worker.runner.adapters.slots import AdapterSlots
from worker.runner.adapters.table import Table, TableShape
from worker.runner.batching.support import UNRESTRICTED, BatchingSupport, Together

logger = logging.getLogger(__name__)

_TYPES: Final = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def opening(
    model: Any,
    folders: Mapping[str, Path],
    max_rank: int,
    max_bytes: int,
    vocabulary: int,
    batching: BatchingSupport = UNRESTRICTED,
) -> Generator[None, None, AdapterSlots]:
    """Prepare a model for the adapters of its catalog entry.

    Args:
        folders: the adapters by name.
        max_rank: largest rank that an adapter may have.
        max_bytes: memory for all adapters together.
        vocabulary: number of tokens in the embedding.
        batching: which rows may share passes.

    Yields:
        After each short step.
    """
    layers = ModelLayers.of(model)
    fitted, problems = yield from _fitting(layers, folders, max_rank)
    dtype = _dtype(fitted)
    _drop_too_large(layers, fitted, problems, dtype, max_bytes)
    shapes = table_shapes(layers, fitted.values())
    slots = min(len(fitted), _slots(shapes, dtype, max_bytes))
    tables = {path: Table(shape, 1 + slots, dtype) for path, shape in shapes.items()}
    adapted = _adapt(layers, tables)
    alone = Together.ONE_BY_ONE in (batching.prefill, batching.decode)
    if slots and (problem := (yield from proof.proving(model, list(tables.values()), slots, vocabulary, alone=alone))):
        for module in adapted:
            restore(module)
        problems |= dict.fromkeys(fitted, problem)
        fitted, tables, slots = {}, {}, 0
    for name, problem in problems.items():
        logger.warning("adapter_unusable", extra={"adapter": name, "reason": problem})
    return AdapterSlots(layers, tables, fitted, problems, slots, max_rank)


def _fitting(
    layers: ModelLayers, folders: Mapping[str, Path], max_rank: int
) -> Generator[None, None, tuple[dict[str, Fitted], dict[str, str]]]:
    """Return the adapters that fit the model, and the problems of the others, by name."""
    fitted: dict[str, Fitted] = {}
    problems: dict[str, str] = {}
    for name, folder in folders.items():
        try:
            fitted[name] = layers.fit(name, folder, max_rank)
        except ModelError as error:
            problems[name] = str(error)
        yield
    return fitted, problems


def _dtype(fitted: Mapping[str, Fitted]) -> mx.Dtype:
    """Return the type of the tables: the widest of the adapters. On a CPU, MLX has the products only in float32."""
    types = {_TYPES[each] for adapter in fitted.values() for each in adapter.adapter.dtypes}
    return types.pop() if len(types) == 1 and mx.default_device() != mx.cpu else mx.float32


def _drop_too_large(
    layers: ModelLayers, fitted: dict[str, Fitted], problems: dict[str, str], dtype: mx.Dtype, max_bytes: int
) -> None:
    """Refuse the largest adapters until a slot, which has room for each of the others, fits into the memory."""
    while fitted and not _slots(table_shapes(layers, fitted.values()), dtype, max_bytes):
        sizes = {name: _slot_bytes(table_shapes(layers, [each]), dtype) for name, each in fitted.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        del fitted[largest]
        problems[largest] = (
            f"it takes at least {2 * sizes[largest] / 2**20:,.1f} MiB with the empty slot, but adapters may take "
            f"{max_bytes / 2**20:,.1f} MiB (ADAPTER_BYTES)"
        )


def _slots(shapes: Mapping[str, TableShape], dtype: mx.Dtype, max_bytes: int) -> int:
    """Return how many slots fit into the memory in addition to the empty one, which has the same size."""
    return max(0, max_bytes // _slot_bytes(shapes, dtype) - 1) if shapes else 0


def _slot_bytes(shapes: Mapping[str, TableShape], dtype: mx.Dtype) -> int:
    return sum(shape.nbytes(dtype) for shape in shapes.values())


def _adapt(layers: ModelLayers, tables: Mapping[str, Table]) -> list[Any]:
    """Let layers and groups of experts use the tables; return them."""
    groups = {id(group): group for path in tables if (group := layers.group(path)) is not None}
    for group in groups.values():
        adapt(group)
    for path, table in tables.items():
        adapt(layers[path], table)
    return [*groups.values(), *(layers[path] for path in tables)]
