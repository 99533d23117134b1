"""The memory that a device has for caches, and the detection of failed allocations.

MLX does not always raise when an allocation fails: on a CPU the process ends, and on a GPU it may. The engine therefore
estimates the memory of rows before it admits them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from shared.runtime import OWN, ROOT, control_groups
from worker.runner.base import OutOfMemory

GPU_SHARE = 0.9
MACHINE_SHARE = 0.8
"""Fractions of the free memory to use. The rest is for temporary arrays of a step and for other processes."""
PREFIX_SHARE = 0.25
"""Default fraction of the cache memory for prefixes."""

_V2 = ("memory.max", "memory.current")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_OUT_OF_MEMORY_TEXT = re.compile(
    r"malloc|unable to allocate|out of memory|insufficient memory|memory allocation", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether MLX or Python raised this error for a failed allocation."""
    if isinstance(error, RuntimeError):
        return bool(_OUT_OF_MEMORY_TEXT.search(str(error)))
    return isinstance(error, MemoryError | OutOfMemory)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Replace the errors that MLX and Python raise for a failed allocation with `OutOfMemory`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from error


@dataclass(frozen=True, slots=True)
class Memory:
    """Limits for the caches of a model.

    Attributes:
        max_bytes: for the caches of rows and prefixes together.
        prefix_bytes: the part of it that prefixes may take.
    """

    max_bytes: int
    prefix_bytes: int


UNLIMITED = Memory(sys.maxsize, 0)
"""No limit for rows, and no prefixes."""


def device_limit(workers: int) -> int:
    """Return the maximum bytes that MLX should use on this device, including models.

    Args:
        workers: number of worker processes that share the device.
    """
    device = mx.device_info()
    if (working_set := device.get("max_recommended_working_set_size")) is not None:  # Metal
        return int(GPU_SHARE * int(working_set) / workers)
    ours = mx.get_active_memory()
    if (free := device.get("free_memory")) is not None:  # CUDA
        return int(GPU_SHARE * (ours + int(free)) / workers)
    return ours + int(MACHINE_SHARE * available_memory() / workers)


def available_memory() -> int:
    """Return the bytes that this process may still allocate: the minimum over the machine and its control groups."""
    return min([_free_of_machine(), *_free_of_groups()])


def _free_of_machine() -> int:
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_of_groups(root: Path = ROOT, own: Path = OWN) -> list[int]:
    """Return the free bytes of each control group that limits this process."""
    candidates = (_free_of_group(group, *(_V1 if v1 else _V2)) for group, v1 in control_groups(root, own))
    return [free for free in candidates if free is not None]


def _free_of_group(group: Path, limit_file: str, usage_file: str) -> int | None:
    try:
        limit, used = (group / limit_file).read_text().strip(), int((group / usage_file).read_text())
        idle = re.search(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    # The page cache counts as used, but the kernel reclaims it first.
    return None if limit == "max" else max(0, int(limit) - used + (int(idle[1]) if idle else 0))
