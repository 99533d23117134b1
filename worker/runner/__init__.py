"""Model runners: which one serves a model is a matter of settings."""

from __future__ import annotations

import gc
import sys
from functools import partial

from shared.models.catalog import CatalogModel
from shared.settings import Settings
from worker.runner.base import RunnerLoader


def choose_loader(settings: Settings, model: CatalogModel) -> RunnerLoader:
    """The loader of the runner that BACKEND asks for.

    Libraries are imported only here, and only those needed: `fake` runs where MLX is not installed, and MLX must not be
    imported before its BLAS is chosen.
    """
    if settings.backend == "fake":
        from worker.runner import fake

        return partial(fake.load, model)
    from worker.runner import loading

    return partial(loading.load, settings, model)


def memory_limit(settings: Settings) -> int:
    """Bytes that all models of this process and their caches may take."""
    if settings.backend == "fake":
        return settings.memory_limit_bytes or sys.maxsize
    from worker.runner.memory import device_limit

    return settings.memory_limit_bytes or device_limit(settings.workers)


def memory_in_use() -> int:
    """Bytes that the model library holds, if one is in use."""
    core = sys.modules.get("mlx.core")
    return int(core.get_active_memory()) if core is not None else 0


def release() -> None:
    """Return to the machine what a model that was unloaded has held, if a model library is in use."""
    # `shared.garbage` froze what there was when the process was ready; frozen cycles are never collected.
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    if (core := sys.modules.get("mlx.core")) is not None:
        core.clear_cache()
