"""Loads a model and makes its runner, in pieces between which rows of other models decode."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import maybe_set_recommended_wired_limit

from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.settings import Settings
from worker.models.load import LoadedModel, convert, first_line, load_model
from worker.runner import kv_cache, kv_segments
from worker.runner.memory import SHARE_OF_PREFIXES, Memory, device_limit
from worker.runner.model_runner import MLXRunner, default_chunk
from worker.runner.prefix.files import PrefixFiles, fingerprint
from worker.runner.prefix.spill import Spill
from worker.runner.vision.family import VisionFamily

SHARE_ON_THE_WAY = 8
"""Divisor: evicted prefixes that are not on disk yet may take 1/8 of the memory for prefixes."""

PIECE_BYTES = 64 * 2**20
"""Bytes of weights that are read between two steps of other models."""
READ_SHARE = 0.9
"""The part of the loading that is reading; the rest is warming."""
_LEFT_A_PIECE = 0.95
"""Each piece of warming leaves this part of the remaining progress: the number of pieces depends on the model."""


def load(settings: Settings, model: CatalogModel) -> Generator[float, None, MLXRunner]:
    """Load and warm a model, in pieces; each yields the progress.

    Raises:
        ModelError: it cannot be served.
    """
    if settings.wired_limit:
        maybe_set_recommended_wired_limit()
    loaded, family = _loaded(model)
    convert(loaded, model.dtype, model.quantize_bits)
    yield from read_weights(loaded.model, model)
    if family is not None:
        if model.dtype is not None:
            family.encoder.tower.set_dtype(getattr(mx, model.dtype))
        yield from read_weights(family.encoder.tower, model)
    runner = _runner(settings, model, loaded, family)
    left = 1 - READ_SHARE
    for _ in runner.warming():
        left *= _LEFT_A_PIECE
        yield 1 - left
    return runner


def read_weights(module: Any, model: CatalogModel) -> Generator[float, None, None]:
    """Read the weights of a lazily loaded module, some tens of megabytes at a time.

    Raises:
        ModelError: they cannot be read.
    """
    arrays: list[mx.array] = list(dict(tree_flatten(module.parameters())).values())
    total = sum(array.nbytes for array in arrays)
    done = piece = 0
    waiting: list[mx.array] = []
    for array in arrays:
        waiting.append(array)
        piece += array.nbytes
        if piece >= PIECE_BYTES or array is arrays[-1]:
            try:
                mx.eval(waiting)
            except Exception as error:  # of a file that was cut, say
                raise ModelError(f"The weights in {model.path} cannot be read: {first_line(error)}") from error
            done, piece, waiting = done + piece, 0, []
            yield READ_SHARE * done / max(total, 1)


def _loaded(model: CatalogModel) -> tuple[LoadedModel, VisionFamily | None]:
    if model.kind != "vision":
        return load_model(model.path, adapter=model.adapter, lazy=True), None
    if model.adapter is not None:
        raise ModelError(
            f"{model.path}: `adapter` is for text models; remove it from the catalog entry of this vision model."
        )
    from worker.runner.vision.load import load_vision_model

    return load_vision_model(model.path, lazy=True)


def _runner(settings: Settings, model: CatalogModel, loaded: LoadedModel, family: VisionFamily | None) -> MLXRunner:
    if not kv_cache.batchable(loaded.model):
        raise ModelError(f"{model.path} cannot be served: mlx-lm has no batch cache for its kind of model.")
    memory = _memory(settings)
    mx.set_memory_limit(mx.get_active_memory() + memory.most_bytes)
    runner = MLXRunner(
        loaded,
        settings.prefill_step_tokens or default_chunk(),
        memory,
        _spill(settings, loaded.model, model, memory),
        family,
        speculation_tokens=settings.speculation_tokens,
    )
    if runner.row_bytes(1) > memory.most_bytes:
        raise ModelError(f"{model.path} leaves no memory for jobs; see MEMORY_LIMIT_BYTES.")
    return runner


def _memory(settings: Settings) -> Memory:
    """What the model, which is loaded, leaves of the memory that MEMORY_LIMIT_BYTES or the device allows."""
    limit = settings.memory_limit_bytes or device_limit(settings.workers)
    left = max(0, limit - mx.get_active_memory())
    asked = settings.prefix_cache_bytes
    return Memory(left, int(SHARE_OF_PREFIXES * left) if asked == "auto" else asked)


def _spill(settings: Settings, module: Any, model: CatalogModel, memory: Memory) -> Spill | None:
    """The disk for prefixes, opened; None where there is to be none, or this model's cannot be written."""
    if not settings.prefix_disk_bytes or not memory.prefix_bytes or not kv_segments.storable(module):
        return None
    layout = f"{mx.default_device()} {type(module).__module__} {model.dtype} {model.quantize_bits}"
    if model.adapter is not None:  # one folder may be several models
        layout += fingerprint(model.adapter, "", "adapter_config.json")
    name = fingerprint(model.path, layout)
    files = PrefixFiles(settings.prefixes_dir, name, settings.prefix_disk_bytes, settings.retention_s)
    spill = Spill(files, memory.prefix_bytes // SHARE_ON_THE_WAY)
    spill.open()
    return spill
