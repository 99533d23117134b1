"""Environments with libraries that are only compared with."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def environment_with(folder: Path, *requirements: str) -> Path:
    """Return the Python of a new environment that has the packages of this one and a library.

    Skips the test if the library cannot be installed, or imported without what it requires in addition.

    Args:
        requirements: the library, named like its module, then what else to install.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *requirements]
    if subprocess.run(install, check=False, capture_output=True).returncode:
        pytest.skip(f"{requirements[0]} cannot be installed")
    module = requirements[0].partition("==")[0].replace("-", "_")
    if subprocess.run([python, "-P", "-c", f"import {module}"], check=False, capture_output=True).returncode:
        pytest.skip(f"{requirements[0]} cannot be imported")
    return python
