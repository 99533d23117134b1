"""How much memory this machine, or the control group (container) around this process, has in all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")


class ControlGroup(NamedTuple):
    """A control group that counts this process's memory: its folder, and whether its interface is cgroup v1."""

    folder: Path
    v1: bool


def control_groups(root: Path = ROOT, own: Path = OWN) -> Iterator[ControlGroup]:
    """The control groups around this process, the innermost first; none where there are none.

    Args:
        root: where control groups are mounted.
        own: the file that lists the process's groups.
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
        # Inside a container the path may be the host's; the group that counts is then at the top.
        around = [inner, *(group for group in inner.parents if group.is_relative_to(top))]
        yield from (ControlGroup(group, v1) for group in dict.fromkeys([*around, top]))


def total_memory(root: Path = ROOT, own: Path = OWN) -> int:
    """Bytes of memory that this process could use at most: the smallest of the machine's and its groups' limits."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group, v1 in control_groups(root, own):
        try:
            limits.append(int((group / ("memory.limit_in_bytes" if v1 else "memory.max")).read_text()))
        except (OSError, ValueError):  # no such group here, or "max"
            continue
    return min(limits)
