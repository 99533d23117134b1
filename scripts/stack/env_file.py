"""Writes the secrets of the first run to `.env`."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_HEADER = "# Settings, one NAME=value per line; environment variables take precedence. All settings: .env.example"


def add_missing(path: Path, values: Mapping[str, str]) -> None:
    """Add the variables that have no value in the file. A missing file is created, readable by its owner only.

    Other lines are kept. The file is replaced atomically, so readers never see a part of it.

    Raises:
        OSError: the path is not a regular file, the file cannot be read, or its folder cannot be written.
    """
    path = path.resolve()  # replace the target of a link, not the link
    if path.exists() and not path.is_file():  # such as /dev/null, which root could replace
        reason = f"it is not a regular file; set {' and '.join(values)} in the environment"
        raise OSError(errno.EINVAL, reason, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else [_HEADER]
        completed = _complete(lines, values)
        if completed != lines:
            _replace(path, "\n".join(completed) + "\n")


def _complete(lines: list[str], values: Mapping[str, str]) -> list[str]:
    """Return the lines with the missing variables appended."""
    missing = {name: value for name, value in values.items() if not any(_value(line, name) for line in lines)}
    # `NAME=` without a value is replaced: a variable must not appear twice.
    kept = [line for line in lines if not any(_value(line, name) == "" for name in missing)]
    return kept + [f"{name}={value}" for name, value in missing.items()]


def _value(line: str, name: str) -> str | None:
    """Return the value that a line assigns to the variable; None if it assigns none."""
    key, equals, value = line.strip().removeprefix("export ").partition("=")
    return value.strip().strip("'\"") if equals and key.strip() == name else None


def _replace(path: Path, text: str) -> None:
    # mkstemp opens with O_EXCL and mode 600, so no other user can have created the file or a link in its place.
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder: two first runs with one `.env` and different DATA_DIRs must agree on one key."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
