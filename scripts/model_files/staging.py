"""Making a model folder so that it is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def locked(models_dir: Path) -> Iterator[None]:
    """Hold `models_dir` alone: of two commands at once, the second waits and finds the first one's work."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / ".lock"):
        yield


@contextmanager
def staged(target: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `target` to fill; it takes `target`'s name when the block ends well.

    Args:
        target: the folder to make or to replace.
        resumable: keep what an interrupted block left, and offer it to the next one.
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
    """Put `successor` (a folder or a link) in `target`'s place."""
    if not target.is_dir() or target.is_symlink():
        target.unlink(missing_ok=True)
        successor.rename(target)
        return
    # A folder cannot be renamed over one that has content.
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    successor.rename(target)
    shutil.rmtree(old)
