"""How often the kernel's OOM killer has struck in this process's control group."""

from __future__ import annotations

from pathlib import Path

from shared.machine_memory import OWN, ROOT, control_groups


def read_oom_kills(own: Path = OWN, root: Path = ROOT) -> int | None:
    """Processes that the kernel has killed in this control group for want of memory; None where that cannot be read.

    Args:
        own: the file that lists the process's control groups.
        root: where control groups are mounted.
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
