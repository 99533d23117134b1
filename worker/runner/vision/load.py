"""Loads vision models by their family."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mlx_vlm import utils

from shared.models.folder import VISION_FAMILIES, ModelError, check_folder
from worker.models.load import LoadedModel, contained
from worker.runner.vision.family import VisionFamily


def load_vision_model(folder: Path, *, lazy: bool = False) -> tuple[LoadedModel, VisionFamily]:
    """Load a model folder.

    Args:
        lazy: do not read the weights yet.

    Returns:
        The language model with its tokenizer, and the vision part.

    Raises:
        ModelError: the folder is incomplete, broken or of an unsupported family.
    """
    check_folder(folder)
    folder = folder.resolve()  # the libraries take a relative path for a hub id
    with contained(f"The model in {folder} cannot be loaded"):
        config = utils.load_config(folder)
        family = config.get("model_type")
        if family not in VISION_FAMILIES:
            raise ModelError(
                f"{folder}: images are not supported for model_type {family!r}, only for {', '.join(VISION_FAMILIES)}."
            )
        module: Any = importlib.import_module(f"worker.runner.vision.{family}")
        loaded: tuple[LoadedModel, VisionFamily] = module.load(folder, config, lazy=lazy)
        return loaded
