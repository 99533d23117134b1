"""Reads how many processes of this control group the kernel's OOM killer has killed."""

from __future__ import annotations

from pathlib import Path

from shared.runtime import OWN, ROOT, control_groups


def read_oom_kills(own: Path = OWN, root: Path = ROOT) -> int | None:
    """Return the number of OOM kills in this process's control group; None if it cannot be read.

    Args:
        own: the file that lists the process's control groups.
        root: the mount point of control groups.
    """
    counts = (
        _read_count(group / ("memory.oom_control" if v1 else "memory.events"))
        for group, v1 in control_groups(root, own)
    )
    return next((count for count in counts if count is not None), None)


def _read_count(path: Path) -> int | None:
    try:
        pairs = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return int(pairs["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
