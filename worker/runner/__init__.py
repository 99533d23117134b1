"""Model runners: everything that computes tokens, behind the `ModelRunner` protocol that the engine calls."""

from __future__ import annotations

import gc
import sys
from functools import partial

from shared.jobs.request import EMBED, RERANK
from shared.models.catalog import CatalogModel
from shared.settings import Settings
from worker.runner.base import RunnerLoader


def choose_loader(settings: Settings, model: CatalogModel) -> RunnerLoader:
    """Return the loader of the runner that the BACKEND setting selects.

    Imports a runner's libraries only when that runner is selected: the fake runner works where MLX is not installed,
    and MLX must not be imported before its BLAS library is chosen.
    """
    if settings.backend == "fake":
        from worker.runner import fake

        return partial(fake.load, model)
    if settings.backend == "scripted":
        from worker.runner import scripted

        return partial(scripted.load, settings, model)
    if model.kind in (EMBED, RERANK):
        from worker.runner.embedding import load

        return partial(load.load, settings, model)
    from worker.runner import loading

    return partial(loading.load, settings, model)


def memory_limit(settings: Settings) -> int:
    """Return the maximum bytes for all models of this process and their caches."""
    if settings.modelless:
        return settings.memory_limit_bytes or sys.maxsize
    from worker.runner.memory import device_limit

    return settings.memory_limit_bytes or device_limit(settings.workers)


def memory_in_use() -> int:
    """Return the bytes that MLX has allocated; 0 if MLX is not loaded."""
    core = sys.modules.get("mlx.core")
    return int(core.get_active_memory()) if core is not None else 0


def release() -> None:
    """Free the memory of models that were unloaded, including the buffers that MLX keeps for reuse."""
    # `shared.runtime` freezes all objects once the process is ready, and frozen cycles are never collected.
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    if (core := sys.modules.get("mlx.core")) is not None:
        core.clear_cache()
