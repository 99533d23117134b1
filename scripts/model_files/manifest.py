"""`mlxq.json`: where a fetched model came from, and what its folder must hold.

It is the last file written, so a folder that has one was once complete.
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
"""Raised when the conversion changes what it writes: older folders are then made again."""

_SMALL = 16 * 2**20
"""Files below this are read again to check a folder; of larger ones the length is enough."""


@dataclass(frozen=True)
class Origin:
    """Where a model came from."""

    source: str
    revision: str
    requested: str = ""
    """The branch or tag that led to `revision`, when one was asked for."""
    dtype: str = ""
    """The type it was converted to; empty when it was taken as it is."""
    inputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file it was made from."""


def write_manifest(folder: Path, origin: Origin, known: Mapping[str, str] | None = None) -> None:
    """Record `origin` and every file of `folder`.

    Args:
        known: SHA-256 of files that have just been checked.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        name: {"size": path.stat().st_size, "sha256": (known or {}).get(name) or sha256(path)}
        for name, path in ((path.relative_to(folder).as_posix(), path) for path in paths)
    }
    content = {"recipe": _RECIPE, **asdict(origin), "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """Where `folder` came from; None when it has no manifest that can be read."""
    content = _read(folder)
    try:
        return Origin(**{name: content[name] for name in Origin.__dataclass_fields__})
    except KeyError:
        return None


def is_intact(folder: Path) -> bool:
    """Whether `folder` still holds what its manifest records, made the way it is made today."""
    content = _read(folder)
    files = content.get("files", {})
    return content.get("recipe") == _RECIPE and all(_is_same(folder / name, files[name]) for name in files)


def check_replaceable(target: Path, source: str) -> None:
    """Raise ModelError if something else than an earlier `source` is where `target` shall be."""
    if not (target.exists() or target.is_symlink()):
        return
    origin = None if target.is_symlink() else read_origin(target)
    if origin is None:
        raise ModelError(f"{target} exists and was not fetched from {source}; --force replaces it")
    if origin.source != source:
        raise ModelError(f"{target} holds {origin.source}; --force replaces it, --name puts {source} beside it")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise ModelError unless the file is the one expected."""
    if (actual := sha256(path)) != expected:
        raise ModelError(f"{path.name} has SHA-256 {actual}, expected {expected}: not the pinned file, not used")


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
