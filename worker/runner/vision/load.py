"""Loads folders of vision models, by their family."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

from mlx_vlm import utils

from shared.models.folder import ModelError, check_folder
from worker.models.load import LoadedModel, contained
from worker.runner.vision.family import VisionFamily

FAMILIES: Final = ("qwen2_5_vl",)
"""What config.json calls the families, each a module of this package with a `load` function."""


def load_vision_model(folder: Path, *, lazy: bool = False) -> tuple[LoadedModel, VisionFamily]:
    """Load a model folder: its language model with the tokenizer, and its family's part.

    Raises:
        ModelError: something in it is missing or cannot be used.
    """
    check_folder(folder)
    folder = folder.resolve()  # a relative one looks like a hub id to the libraries
    with contained(f"The model in {folder} cannot be loaded"):
        config = utils.load_config(folder)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ModelError(f"{folder} is of a kind ({family}) whose images are not understood here")
        module: Any = importlib.import_module(f"worker.runner.vision.{family}")
        loaded: tuple[LoadedModel, VisionFamily] = module.load(folder, config, lazy=lazy)
        return loaded
