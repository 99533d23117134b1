"""Asking for the disk space before it is missed."""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.models.folder import ModelError

_GB = 1e9


def check_space(folder: Path, needed: int) -> None:
    """Raise ModelError unless `folder`'s disk has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(f"the disk of {folder} is full: {needed / _GB:.2f} GB needed, {free / _GB:.2f} GB free")
