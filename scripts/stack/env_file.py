"""Writing `.env`: the secrets of the first run."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_HEADER = "# Settings of this stack, one NAME=value a line; the environment wins. All of them: .env.example"


def add_missing(path: Path, values: Mapping[str, str]) -> None:
    """Set the variables that have no value in the file; create it, readable by its owner alone, when it is missing.

    The file is replaced as a whole, so that a reader never sees half of it, and what stands in it stays.

    Raises:
        OSError: the path is not a regular file, the file cannot be read, or its folder cannot be written.
    """
    path = path.resolve()  # a link stays a link
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
    """The lines with what is missing added at the end, and an empty `NAME=` of it taken out."""
    missing = {name: value for name, value in values.items() if not any(_value(line, name) for line in lines)}
    # An empty value means the default; a second line beside it would be two answers to one question.
    kept = [line for line in lines if not any(_value(line, name) == "" for name in missing)]
    return kept + [f"{name}={value}" for name, value in missing.items()]


def _value(line: str, name: str) -> str | None:
    """What the line gives the variable; None when it is about something else."""
    found, equals, value = line.strip().removeprefix("export ").partition("=")
    return value.strip().strip("'\"") if equals and found.strip() == name else None


def _replace(path: Path, text: str) -> None:
    # mkstemp opens with O_EXCL and mode 600, and the name is unique: nobody can have prepared a trap there.
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
    """Two first runs with one `.env` and two DATA_DIRs agree on one key."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
