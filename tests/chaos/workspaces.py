"""The folder of a run, which tells whose it is, so that the next run can clear up after one that was killed."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import psutil

from scripts.stack import processes
from tests.chaos import disks, network_faults

_NAME = re.compile(r"mlxq-chaos-(\d+)-.*")


def new(pid: int) -> Path:
    """A folder for the run of this process."""
    return Path(tempfile.mkdtemp(prefix=f"mlxq-chaos-{pid}-"))


def sweep() -> None:
    """End the processes that dead runs have left, and take their disks and networks away; their logs stay."""
    for workspace in orphans(Path(tempfile.gettempdir())):
        if processes.find(workspace):
            processes.terminate_all(workspace, grace_s=0)
        disks.sweep(workspace)
    network_faults.sweep()


def orphans(folder: Path) -> list[Path]:
    """The folders of runs that live no more."""
    found = ((workspace, _NAME.fullmatch(workspace.name)) for workspace in folder.iterdir())
    return [workspace for workspace, match in found if match and not psutil.pid_exists(int(match[1]))]
