"""`mlxq.json`: the origin of a fetched model and the files of its folder.

It is written last, so a folder that has one was complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.models.facts import MANIFEST
from shared.models.folder import ModelError

_RECIPE = 1
"""Version of the conversion. A change makes older folders be created again."""

_SMALL = 16 * 2**20
"""Files below this size are verified by hash, larger ones only by size."""


@dataclass(frozen=True)
class Origin:
    """The origin of a model."""

    source: str
    revision: str
    requested: str = ""
    """The requested branch or tag, if any; `revision` is its commit."""
    dtype: str = ""
    """Data type after the conversion; empty if it was not converted."""
    inputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the source files."""


def write_manifest(folder: Path, origin: Origin, known: Mapping[str, str] | None = None) -> None:
    """Record `origin` and every file of `folder`.

    Args:
        known: SHA-256 of files that were just verified.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        name: {"size": path.stat().st_size, "sha256": (known or {}).get(name) or sha256(path)}
        for name, path in ((path.relative_to(folder).as_posix(), path) for path in paths)
    }
    content = {"recipe": _RECIPE, **asdict(origin), "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """Return the origin of a folder; None if it has no valid manifest."""
    content = _read(folder)
    try:
        return Origin(**{name: content[name] for name in Origin.__dataclass_fields__})
    except KeyError:
        return None


def is_intact(folder: Path) -> bool:
    """Whether a folder still matches its manifest, written by the current version of the conversion."""
    content = _read(folder)
    files = content.get("files", {})
    return content.get("recipe") == _RECIPE and all(_is_same(folder / name, files[name]) for name in files)


def check_replaceable(target: Path, source: str) -> None:
    """Raise ModelError if `target` exists and does not come from `source`."""
    if not (target.exists() or target.is_symlink()):
        return
    origin = None if target.is_symlink() else read_origin(target)
    if origin is None:
        raise ModelError(f"{target} exists and was not fetched from {source}; --force replaces it")
    if origin.source != source:
        raise ModelError(
            f"{target} contains {origin.source}; --force replaces it, --name gives {source} another folder"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise ModelError if a file does not have the expected SHA-256."""
    if (actual := sha256(path)) != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {actual}, expected {expected}: it is not the pinned file and is not used"
        )


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_same(path: Path, recorded: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    size = path.stat().st_size
    return size == recorded["size"] and (size >= _SMALL or sha256(path) == recorded["sha256"])
