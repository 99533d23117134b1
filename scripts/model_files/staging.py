"""Creates model folders atomically."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def locked(models_dir: Path) -> Iterator[None]:
    """Lock `models_dir`: a second command waits, and then finds the first one's result."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / ".lock"):
        yield


@contextmanager
def staged(target: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield a hidden folder next to `target`; it is renamed to `target` if the block succeeds.

    Args:
        target: the folder to create or replace.
        resumable: keep the folder after a failure, and yield it again next time.
    """
    partial = target.with_name(f".{target.name}.partial")
    if not resumable:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    replace(target, partial)


def replace(target: Path, successor: Path) -> None:
    """Replace `target` with `successor`, a folder or a link."""
    if not target.is_dir() or target.is_symlink():
        target.unlink(missing_ok=True)
        successor.rename(target)
        return
    # A folder cannot be renamed to one that is not empty.
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    successor.rename(target)
    shutil.rmtree(old)
