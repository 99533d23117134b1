"""The model libraries a worker can run on; which one is a matter of settings."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial

from shared.models.catalog import CatalogModel
from shared.settings import Settings
from worker.runner.base import BackendLoader


def choose_loader(settings: Settings, model: CatalogModel, clock: Callable[[], float]) -> BackendLoader:
    """The loader of the backend that a model and BACKEND ask for; it will judge by the clock what its steps take.

    Libraries are imported only here, and only the one needed: `fake` runs where MLX is not installed, and MLX must
    not be imported before its BLAS is chosen.
    """
    if settings.backend == "fake":
        from worker.runner import fake

        return partial(fake.load, model)
    if model.kind == "vision":
        from worker.runner.vision import family as vision

        return partial(vision.load, settings, model, clock)
    from worker.runner import model_runner as text

    return partial(text.load, settings, model, clock)


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
    """Give back to the machine what a model that is gone has held, if a model library is in use."""
    gc.collect()
    if (core := sys.modules.get("mlx.core")) is not None:
        core.clear_cache()
