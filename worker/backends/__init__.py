"""The model libraries a worker can run on; which one is a matter of settings."""

from __future__ import annotations

from functools import partial

from shared.model_folder import model_kind
from shared.settings import Settings
from worker.backends.base import BackendLoader


def choose_loader(settings: Settings) -> BackendLoader:
    """The loader of the backend that MODEL_PATH and BACKEND ask for.

    Libraries are imported only here, and only the one needed: `fake` runs where MLX is not installed, and MLX must
    not be imported before its BLAS is chosen.
    """
    if settings.backend == "fake":
        from worker.backends import fake

        return partial(fake.load, settings)
    if model_kind(settings.model_path) == "vision":
        from worker.backends import vision

        return partial(vision.load, settings)
    from worker.backends import text

    return partial(text.load, settings)
