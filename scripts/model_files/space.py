"""Checks disk space in advance."""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.models.folder import ModelError

_GB = 1e9


def check_space(folder: Path, needed: int) -> None:
    """Raise ModelError if the disk of a folder has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(f"the disk of {folder} is full: {needed / _GB:.2f} GB needed, {free / _GB:.2f} GB free")
