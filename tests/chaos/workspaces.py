"""The folders of runs. Their names contain the run's pid, so that the next run can clean up after a killed one."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import psutil

from scripts.stack import processes
from tests.chaos import disks, network_faults

_NAME = re.compile(r"mlxq-chaos-(\d+)-.*")


def create(pid: int) -> Path:
    """Create a folder for the run of a process."""
    return Path(tempfile.mkdtemp(prefix=f"mlxq-chaos-{pid}-"))


def clean_up() -> None:
    """Remove the processes, disks and networks of killed runs. Their logs are kept."""
    for workspace in find_orphans(Path(tempfile.gettempdir())):
        if processes.find(workspace):
            processes.terminate_all(workspace, grace_s=0)
        disks.clean_up(workspace)
    network_faults.clean_up()


def find_orphans(folder: Path) -> list[Path]:
    """Return the folders of runs whose process has ended."""
    matches = ((workspace, _NAME.fullmatch(workspace.name)) for workspace in folder.iterdir())
    return [workspace for workspace, match in matches if match and not psutil.pid_exists(int(match[1]))]
