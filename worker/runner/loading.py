"""Loads a model and creates its runner, in short steps so that rows of other models can decode in between."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import maybe_set_recommended_wired_limit

from shared.models.catalog import CatalogModel
from shared.models.folder import PROCESSORS, ModelError
from shared.settings import Settings
from worker.models.load import LoadedModel, convert, first_line, load_model
from worker.runner import cpu_attention, kv_cache
from worker.runner.adapters.opening import opening
from worker.runner.adapters.slots import AdapterSlots
from worker.runner.batching import verdict
from worker.runner.batching.proof import CannotRun
from worker.runner.batching.support import BatchingSupport
from worker.runner.memory import PREFIX_SHARE, Memory, device_limit
from worker.runner.model_runner import MLXRunner, default_chunk
from worker.runner.prefix.files import PrefixFiles, fingerprint
from worker.runner.prefix.spill import Spill
from worker.runner.quantized_cache import CannotQuantize, quantize_cache
from worker.runner.speculation import draft_model
from worker.runner.vision.half import VisionHalf

PENDING_WRITES_DIVISOR = 8
"""Evicted prefixes that are waiting to be written to disk may take 1/8 of the memory for prefixes."""

PROOF_DIVISOR = 4
"""A proof may take 1/4 of the memory for caches, which is not needed before jobs run."""

ADAPTERS_DIVISOR = 8
"""By default, adapters may take 1/8 of the memory for caches."""
MAX_ADAPTERS_DIVISOR = 2
"""Adapters may take at most half of the memory for caches."""

PIECE_BYTES = 64 * 2**20
"""Bytes of weights that are read between two decode steps of other models."""
READ_SHARE, PROOF_SHARE = 0.9, 0.95
"""Progress after reading the weights, and after the proof of the batching; the rest is for the warm-up."""
_DECAY = 0.95
"""Each step of the proof or the warm-up leaves this fraction of its remaining progress."""

_PROCESSING = ("mlx-vlm", "transformers", "pillow")
"""Libraries that read and resize images."""

T = TypeVar("T")


def load(settings: Settings, model: CatalogModel) -> Generator[float, None, MLXRunner]:
    """Load and warm a model.

    Yields:
        The progress, 0 to 1, after each short step.

    Raises:
        ModelError: the model cannot be served.
    """
    cpu_attention.install()
    if settings.wired_limit:
        maybe_set_recommended_wired_limit()
    loaded, vision = _loaded(model)
    convert(loaded, model.dtype, model.quantize_bits)
    yield from read_weights(loaded.model, model)
    if vision is not None:
        if model.dtype is not None:
            vision.encoder.tower.set_dtype(getattr(mx, model.dtype))
        yield from read_weights(vision.encoder.tower, model)
    _quantize_cache(model, loaded)
    draft = _load_draft(model, loaded)
    if draft is not None:
        yield from read_weights(draft.model, model)
    batching = yield from _progress(_batching(settings, model, loaded), READ_SHARE, PROOF_SHARE)
    adapters = yield from _progress(_adapters(settings, model, loaded, batching), PROOF_SHARE, PROOF_SHARE)
    runner = _runner(settings, model, loaded, vision, batching, draft, adapters)
    yield from _progress(runner.warming(), PROOF_SHARE, 1)
    return runner


def _quantize_cache(model: CatalogModel, loaded: LoadedModel) -> None:
    if model.kv_bits is None:
        return
    try:
        quantize_cache(loaded.model, model.kv_bits)
    except CannotQuantize as error:
        problem = "this architecture does not support `kv_bits`; remove it from the catalog entry"
        raise ModelError(f"{model.path}: {problem} ({first_line(error)})") from error


def _load_draft(model: CatalogModel, loaded: LoadedModel) -> LoadedModel | None:
    """Load the model that drafts tokens. Its weights are read only when they are evaluated."""
    if model.draft is None:
        return None
    draft = load_model(model.draft, lazy=True)
    if draft.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise ModelError(
            f"{model.path}: `draft_model` {model.draft} has another tokenizer; choose a model with the same."
        )
    if not draft_model.usable(draft.model):
        raise ModelError(
            f"{model.path}: `draft_model` {model.draft} has recurrent layers, which drafts do not support."
        )
    return draft


def _progress(steps: Generator[None, None, T], start: float, end: float) -> Generator[float, None, T]:
    """Run steps, whose number is unknown; yield the progress from `start` towards `end` after each."""
    remaining = end - start
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            value: T = stop.value
            return value
        remaining *= _DECAY
        yield end - remaining


def read_weights(module: Any, model: CatalogModel) -> Generator[float, None, None]:
    """Read the weights of a lazily loaded module, `PIECE_BYTES` at a time.

    Yields:
        The progress, 0 to `READ_SHARE`.

    Raises:
        ModelError: the weights cannot be read.
    """
    arrays: list[mx.array] = list(dict(tree_flatten(module.parameters())).values())
    total = sum(array.nbytes for array in arrays)
    done = pending_bytes = 0
    pending: list[mx.array] = []
    for array in arrays:
        pending.append(array)
        pending_bytes += array.nbytes
        if pending_bytes >= PIECE_BYTES or array is arrays[-1]:
            try:
                mx.eval(pending)
            except Exception as error:  # for example a truncated file
                raise ModelError(f"The weights in {model.path} cannot be read: {first_line(error)}") from error
            done, pending_bytes, pending = done + pending_bytes, 0, []
            yield READ_SHARE * done / max(total, 1)


def _loaded(model: CatalogModel) -> tuple[LoadedModel, VisionHalf | None]:
    if model.kind != "vision":
        return load_model(model.path, adapter=model.adapter, lazy=True), None
    from worker.runner.vision.load import load_vision_model

    return load_vision_model(model.path, adapter=model.adapter, lazy=True)


def _batching(settings: Settings, model: CatalogModel, loaded: LoadedModel) -> Generator[None, None, BatchingSupport]:
    spare_bytes = _memory(settings).max_bytes // PROOF_DIVISOR
    try:
        vocabulary = loaded.card.vocabulary or len(loaded.tokenizer)
        return (yield from verdict.find(loaded, vocabulary, spare_bytes, settings.batching_dir))
    except CannotRun as error:
        raise ModelError(f"{model.path} cannot be served: {error}") from error


def _adapters(
    settings: Settings, model: CatalogModel, loaded: LoadedModel, batching: BatchingSupport
) -> Generator[None, None, AdapterSlots | None]:
    """Prepare the adapters that requests can name; None if the catalog entry has none."""
    if not model.adapters:
        return None
    available = _memory(settings).max_bytes
    requested = settings.adapter_bytes
    max_bytes = available // ADAPTERS_DIVISOR if requested == "auto" else requested
    max_bytes = min(max_bytes, available // MAX_ADAPTERS_DIVISOR)
    vocabulary = loaded.card.vocabulary or len(loaded.tokenizer)
    folders, max_rank = model.adapters, settings.adapter_max_rank
    return (yield from opening(loaded.model, folders, max_rank, max_bytes, vocabulary, batching))


def _runner(
    settings: Settings,
    model: CatalogModel,
    loaded: LoadedModel,
    vision: VisionHalf | None,
    batching: BatchingSupport,
    draft: LoadedModel | None,
    adapters: AdapterSlots | None,
) -> MLXRunner:
    memory = _memory(settings)
    mx.set_memory_limit(mx.get_active_memory() + memory.max_bytes)
    runner = MLXRunner(
        loaded,
        settings.prefill_step_tokens or default_chunk(),
        memory,
        _spill(settings, loaded.model, model, memory) if batching.continues else None,
        vision,
        batching=batching,
        speculation_tokens=settings.speculation_tokens,
        draft=draft,
        adapters=adapters,
    )
    if runner.row_bytes(1) > memory.max_bytes:
        raise ModelError(f"{model.path} leaves no memory for jobs; raise MEMORY_LIMIT_BYTES or choose a smaller model.")
    return runner


def free_memory(settings: Settings) -> int:
    """Return the bytes that are left of the limit for models and caches."""
    limit = settings.memory_limit_bytes or device_limit(settings.workers)
    return max(0, limit - mx.get_active_memory())


def _memory(settings: Settings) -> Memory:
    """Return the memory for caches: the limit minus the memory that is allocated for this and other models."""
    free = free_memory(settings)
    prefix_bytes = settings.prefix_cache_bytes
    return Memory(free, int(PREFIX_SHARE * free) if prefix_bytes == "auto" else prefix_bytes)


def _spill(settings: Settings, module: Any, model: CatalogModel, memory: Memory) -> Spill | None:
    """Open the disk store for prefixes; None if it is disabled or this model's prefixes cannot be written."""
    if not settings.prefix_disk_bytes or not memory.prefix_bytes or not kv_cache.mergeable(module):
        return None
    layout = f"{mx.default_device()} {type(module).__module__} {model.dtype} {model.quantize_bits} {model.kv_bits}"
    if model.adapter is not None:  # several catalog models may share a folder
        layout += fingerprint(model.adapter, "", "adapter_config.json")
    if model.kind == "vision":
        layout += _processing(model.path)
    name = fingerprint(model.path, layout)
    files = PrefixFiles(settings.prefixes_dir, name, settings.prefix_disk_bytes, settings.retention_s)
    spill = Spill(files, memory.prefix_bytes // PENDING_WRITES_DIVISOR)
    spill.open()
    return spill


def _processing(folder: Path) -> str:
    """Return a hash of what the features of an image depend on, besides the weights and config.json."""
    running = hashlib.sha256(" ".join(map(version, _PROCESSING)).encode())
    for path in filter(Path.is_file, (folder / name for name in PROCESSORS)):
        running.update(path.read_bytes())
    return running.hexdigest()
