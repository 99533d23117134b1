"""A fast BLAS for MLX on a Linux CPU: found, installed where that is possible, or asked for.

MLX's own wheel links the reference BLAS. The worker puts OpenBLAS in front of it when the machine has one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from shared.blas import prefer_openblas

_PACKAGE = "libopenblas0-pthread"
_GAIN = "matrix products on this CPU would run 50 times as fast, generation at 2 to 6 times the speed"
_INSTALL_S = 300


def ensure_openblas(say: Callable[[str], None]) -> None:
    """See that OpenBLAS is there. Says in one line what it did or what to do, and never fails."""
    if _is_fast():
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing {_PACKAGE}: {_GAIN}")
        _install()
    if not _is_fast():
        say(f"no OpenBLAS found: {_GAIN}; on Debian and Ubuntu: apt-get install {_PACKAGE}")


def _is_fast() -> bool:
    return prefer_openblas().name != "reference"


def _install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", _PACKAGE]
    for command in (["apt-get", "update", "--quiet"], install):
        try:
            # A session of its own: a Ctrl-C in the middle would leave dpkg half done.
            subprocess.run(
                command,
                env=environment,
                timeout=_INSTALL_S,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError):
            return


if __name__ == "__main__":
    ensure_openblas(print)
