"""How much memory the device has for caches, and how a failed allocation is recognised.

MLX does not always raise when memory ends: on a CPU a failed allocation ends the process, and so may a GPU's. So rows
are counted before they are admitted.
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

from shared.machine_memory import OWN, ROOT, control_groups
from worker.runner.base import OutOfMemory

SHARE_OF_GPU = 0.9
SHARE_OF_MACHINE = 0.8
"""Of the memory that is free; the rest is for what a step needs beside the caches, and for others."""
SHARE_OF_PREFIXES = 0.25
"""Default share of the memory for caches that prefixes may take."""

_V2 = ("memory.max", "memory.current")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_SAYS_SO = re.compile(r"malloc|unable to allocate|out of memory|insufficient memory|memory allocation", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the model library's error for a failed allocation."""
    if isinstance(error, RuntimeError):
        return bool(_SAYS_SO.search(str(error)))
    return isinstance(error, MemoryError | OutOfMemory)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `OutOfMemory` where the library raises its own error for a failed allocation."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from error


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes there are for the caches of rows and prefixes together, and the most that prefixes may take of them."""

    most_bytes: int
    prefix_bytes: int


UNLIMITED = Memory(sys.maxsize, 0)
"""Without prefixes."""


def device_limit(workers: int) -> int:
    """Bytes that MLX should use on this device, models included, when this many worker processes share it."""
    device = mx.device_info()
    if (working_set := device.get("max_recommended_working_set_size")) is not None:  # Metal
        return int(SHARE_OF_GPU * int(working_set) / workers)
    ours = mx.get_active_memory()
    if (free := device.get("free_memory")) is not None:  # CUDA
        return int(SHARE_OF_GPU * (ours + int(free)) / workers)
    return ours + int(SHARE_OF_MACHINE * available_memory() / workers)


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or what its control group leaves it."""
    return min([_free_of_machine(), *_free_of_groups()])


def _free_of_machine() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_of_groups(root: Path = ROOT, own: Path = OWN) -> list[int]:
    """What each control group around this process leaves it."""
    found = (_free_of_group(group, *(_V1 if v1 else _V2)) for group, v1 in control_groups(root, own))
    return [free for free in found if free is not None]


def _free_of_group(group: Path, limit: str, usage: str) -> int | None:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        idle = re.search(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    # The page cache counts as used, and is reclaimed first.
    return None if most == "max" else max(0, int(most) - used + (int(idle[1]) if idle else 0))
