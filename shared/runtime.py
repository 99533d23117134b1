"""The Python process and the machine that it runs on: the memory limit, and tuning of the garbage collector."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")
_GC_THRESHOLDS: Final = (10_000, 20, 20)
"""A burst of a thousand short-lived objects must not start a garbage collection."""


class ControlGroup(NamedTuple):
    """A control group that limits this process's memory.

    Attributes:
        v1: whether its interface is that of cgroup v1.
    """

    folder: Path
    v1: bool


def control_groups(root: Path = ROOT, own: Path = OWN) -> Iterator[ControlGroup]:
    """Yield the control groups of this process, innermost first; nothing on systems without control groups.

    Args:
        root: mount point of the control group file system.
        own: file that lists the control groups of the process.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        top = root / "memory" if v1 else root
        inner = top / path.lstrip("/")
        # Inside a container the path may be that of the host. The limit is then set at the top.
        ancestors = [inner, *(group for group in inner.parents if group.is_relative_to(top))]
        yield from (ControlGroup(group, v1) for group in dict.fromkeys([*ancestors, top]))


def total_memory(root: Path = ROOT, own: Path = OWN) -> int:
    """Return the smallest of the memory limits of the machine and of the process's control groups, in bytes."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group, v1 in control_groups(root, own):
        try:
            limits.append(int((group / ("memory.limit_in_bytes" if v1 else "memory.max")).read_text()))
        except (OSError, ValueError):  # the group does not exist, or has no limit ("max")
            continue
    return min(limits)


def pause_garbage_collector() -> None:
    """Collect no garbage until `freeze_garbage_collector` is called; call this before imports.

    Nearly all objects that imports create stay in memory, and looking for garbage among them took a sixth of the time.
    """
    gc.disable()


def freeze_garbage_collector() -> None:
    """Exclude all present objects from future garbage collections; call it after imports and loading.

    Collections of a process with many objects would cause long pauses.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.enable()
