"""Writes safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from shared.models.folder import ModelError


def save_weights(path: Path, weights: Mapping[str, mx.array]) -> None:
    """Write weights in the format that mlx-lm reads.

    Raises:
        ModelError: writing failed, usually because the disk is full. MLX does not give the reason.
    """
    try:
        mx.save_safetensors(str(path), dict(weights), metadata={"format": "mlx"})
    except RuntimeError as error:
        raise ModelError(f"cannot write {path.name}, the disk is full or failing: {error}") from error
