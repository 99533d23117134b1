"""Links or copies a local model folder into models/."""

from __future__ import annotations

import shutil
from pathlib import Path

from scripts.model_files.manifest import Origin, write_manifest
from scripts.model_files.staging import replace, staged
from shared.models.folder import CODE, check_complete, check_folder

_NOT_COPIED = [f"*{ending}" for ending in CODE] + [".*"]


def is_ready(target: Path, source: Path) -> bool:
    """Whether `target` is the folder itself or a link to it."""
    return target.exists() and target.resolve() == source.resolve()


def link(target: Path, source: Path) -> None:
    """Create a link from `target` to `source`.

    Raises:
        ModelError: `source` is not a complete model folder.
    """
    check_folder(source)
    successor = target.with_name(f".{target.name}.link")
    successor.unlink(missing_ok=True)
    successor.symlink_to(source.resolve(), target_is_directory=True)
    replace(target, successor)


def copy(target: Path, source: Path) -> None:
    """Copy `source` to `target`, without code and pickles.

    Raises:
        ModelError: `source` is not a complete model folder.
    """
    check_complete(source)
    with staged(target) as folder:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED), dirs_exist_ok=True)
        check_folder(folder)
        write_manifest(folder, Origin(str(source.resolve()), ""))
