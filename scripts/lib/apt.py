"""Installs Debian and Ubuntu packages where possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

_TIMEOUT_S: Final = 300


def can_install() -> bool:
    """Whether this process may install packages."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def install(package: str) -> None:
    """Install a package. Errors are ignored: the caller checks whether the program exists."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", package]
    for each in (["apt-get", "update", "--quiet"], command):
        try:
            # In its own session: Ctrl-C in the middle would leave dpkg in an inconsistent state.
            subprocess.run(
                each,
                env=environment,
                timeout=_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError):
            return
