"""Provides OpenBLAS, a fast BLAS for MLX on Linux CPUs: installs it if possible, or prints how to.

MLX's wheel links the slow reference BLAS. Workers load OpenBLAS in its place if the machine has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from shared.blas import prefer_openblas

_PACKAGE = "libopenblas0-pthread"
_GAIN = "it makes matrix products on this CPU 50 times as fast, and generation 2 to 6 times"
_INSTALL_TIMEOUT_S = 300


def ensure_openblas(report: Callable[[str], None]) -> None:
    """Install OpenBLAS if it is missing and that is possible; report in one line what was done or is to do."""
    if _is_fast():
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        report(f"installing {_PACKAGE}: {_GAIN}")
        _install()
    if not _is_fast():
        report(f"no OpenBLAS found: {_GAIN}; on Debian and Ubuntu: apt-get install {_PACKAGE}")


def _is_fast() -> bool:
    return prefer_openblas().name != "reference"


def _install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", _PACKAGE]
    for command in (["apt-get", "update", "--quiet"], install):
        try:
            # In its own session: Ctrl-C in the middle would leave dpkg in an inconsistent state.
            subprocess.run(
                command,
                env=environment,
                timeout=_INSTALL_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError):
            return


if __name__ == "__main__":
    ensure_openblas(print)
