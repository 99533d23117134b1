"""A small disk for Valkey's files that can be filled: a tmpfs, on machines that allow mounting one."""

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
    """A mounted tmpfs."""

    def __init__(self, folder: Path) -> None:
        """Mount it.

        Raises:
            OSError: this machine does not allow it.
        """
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE},mode=700", _SOURCE, str(folder))

    def fill(self) -> bool:
        """Write until no byte is free; return whether any was."""
        block, written = b"\0" * _BLOCK, 0
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while count := file.write(block):
                written += count
        return written > 0

    def free(self) -> None:
        """Free the space again."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it. Its files are lost."""
        _unmount(self.folder)


def clean_up(home: Path) -> None:
    """Unmount the disk of a killed run."""
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
    """Whether this machine allows mounting a disk, as Linux usually does for root."""
    if os.geteuid() != 0 or not Path("/proc/filesystems").exists():
        return False
    with tempfile.TemporaryDirectory(prefix="mlxq-chaos-") as folder:
        try:
            Disk(Path(folder) / "disk").close()
        except OSError:
            return False
    return True
