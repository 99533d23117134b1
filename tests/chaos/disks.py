"""A small disk for Redis's files, which can be filled: a tmpfs of its own, where this machine lets us mount one."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

_SIZE = "512m"
_BLOCK = 2**20
_SOURCE = "mlxq-chaos"


class Disk:
    """A mounted folder."""

    def __init__(self, folder: Path) -> None:
        """Mount it.

        Raises:
            OSError: this machine does not let us.
        """
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE},mode=700", _SOURCE, str(folder))

    def fill(self) -> bool:
        """Leave no byte free; whether there was one."""
        block, written = b"\0" * _BLOCK, 0
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while count := file.write(block):
                written += count
        return written > 0

    def free(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it, with all that is on it."""
        _unmount(self.folder)


def sweep(home: Path) -> None:
    """Unmount what a dead run has left in its folder."""
    for line in Path("/proc/self/mounts").read_text("utf-8").splitlines() if Path("/proc/self/mounts").exists() else ():
        source, folder = line.split()[:2]
        if source == _SOURCE and Path(folder).is_relative_to(home.resolve()):
            _unmount(Path(folder))


def _unmount(folder: Path) -> None:
    with suppress(OSError):
        _run("umount", "--lazy", str(folder))


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {error.stderr.strip()}") from error


def disks_work() -> bool:
    """Whether this machine lets us mount one: on Linux, root may, if nobody has taken that right away."""
    if os.geteuid() != 0 or not Path("/proc/filesystems").exists():
        return False
    with tempfile.TemporaryDirectory(prefix="mlxq-chaos-") as folder:
        try:
            Disk(Path(folder) / "disk").close()
        except OSError:
            return False
    return True
