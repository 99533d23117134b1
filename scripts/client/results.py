"""The results file: one JSON object a line, added as results come, and read again when a run is continued."""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from scripts.client.prompts import Prompt

SUCCEEDED = "succeeded"
_FIRST_BYTES = b'{"line": '


class NotOurs(Exception):
    """The results file cannot be continued; the message says why."""


@dataclass(frozen=True, slots=True)
class Result:
    """How one line ended. `status` is the job's, or `rejected` when the service did not take it."""

    line: int
    custom_id: str | None
    id: str | None
    status: str
    request: str
    """The prompt's digest."""
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    actions: list[dict[str, Any]] | None = None
    parse_error: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether there is nothing to try again."""
        return self.status == SUCCEEDED

    def to_line(self) -> bytes:
        """The line of the file."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        if self.actions is None:  # nothing was to be parsed
            del fields["actions"], fields["parse_error"]
        # A lone surrogate cannot be UTF-8; escaped with a backslash it is JSON's own spelling of it.
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read what `to_line` wrote.

        Raises:
            ValueError: it did not.
        """
        try:
            result = cls(**json.loads(line))
            _short(result.request)
        except TypeError as error:
            raise ValueError("other fields") from error
        if not isinstance(result.line, int) or result.line < 1:
            raise ValueError("no line number")
        return result


class Index:
    """Which lines have a result, in a few bytes a line: the files may have millions."""

    def __init__(self) -> None:
        self._digests = array("Q")  # the first 64 bits of the prompt's digest; 0: no result
        self._offsets = array("Q")
        self._failed = bytearray()
        self._highest = 0
        self.count = 0
        self.ordered = True
        """Whether the file is in the order of the prompts."""
        self.superseded = False
        """Whether a retry has replaced a result that is still there."""

    def add(self, result: Result, offset: int) -> None:
        """Take note of a result; a later one of the same line takes the earlier one's place."""
        line = result.line
        self._reach(line)
        if self._digests[line]:
            self.superseded = True
        else:
            self.count += 1
        self.ordered = self.ordered and line > self._highest
        self._highest = max(self._highest, line)
        self._digests[line] = _short(result.request)
        self._offsets[line] = offset
        self._failed[line] = not result.succeeded

    def has(self, prompt: Prompt) -> bool:
        """Whether the prompt has a result.

        Raises:
            NotOurs: its line has the result of another prompt.
        """
        known = self._digests[prompt.line] if prompt.line < len(self._digests) else 0
        if known and known != _short(prompt.digest):
            raise NotOurs(f"has a result of another request for line {prompt.line}")
        return known != 0

    def offset(self, line: int) -> int:
        """Where in the file the result of a line that has one begins."""
        return self._offsets[line]

    def offsets_by_line(self) -> Iterator[int]:
        """Where the results that count begin, in the order of the prompts."""
        return (offset for offset, known in zip(self._offsets, self._digests, strict=True) if known)

    def has_failed(self, line: int) -> bool:
        """Whether the line's result is one that may be tried again."""
        return line < len(self._failed) and bool(self._failed[line])

    def _reach(self, line: int) -> None:
        missing = line + 1 - len(self._digests)
        if missing > 0:
            self._digests.extend(array("Q", bytes(8 * missing)))
            self._offsets.extend(array("Q", bytes(8 * missing)))
            self._failed.extend(bytes(missing))


class ResultFile:
    """The file of one run, locked against another run for as long as it is open."""

    def __init__(self, path: Path) -> None:
        """Open, mend and index the file; make it when there is none.

        Raises:
            NotOurs: it holds something else, or another run is writing it.
            OSError: it cannot be read or written.
        """
        self.path = path
        # Unbuffered: a result is one write, so that being killed can tear the last line at most.
        self._file = path.open("ab+", buffering=0)
        try:
            self._lock()
            self.index = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, result: Result) -> None:
        """Add a result."""
        line = result.to_line()
        offset = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) != len(line):
            raise OSError(f"no room for the result of line {result.line} in {self.path}")
        self.index.add(result, offset)

    def read(self, line: int) -> Result:
        """The result of a line that has one."""
        with self.path.open("rb") as file:
            return Result.from_line(_line_at(file, self.index.offset(line)))

    def tidy(self, *, in_order: bool) -> None:
        """Drop results that a retry has replaced, and put the lines in order where that was asked for."""
        if not self.index.superseded and (self.index.ordered or not in_order):
            return
        tidied = self.path.with_name(f".{self.path.name}.tidy")
        with self.path.open("rb") as old, tidied.open("wb") as new:
            for offset in self.index.offsets_by_line():
                new.write(_line_at(old, offset))
            new.flush()
            os.fsync(new.fileno())
        tidied.replace(self.path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NotOurs("is being written by another run") from error

    def _read(self) -> Index:
        index, offset = Index(), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._cut(number, line, offset)
                    break
                try:
                    index.add(Result.from_line(line), offset)
                except ValueError as error:
                    raise NotOurs(f"line {number} of it is not a result of this script") from error
                offset += len(line)
        return index

    def _cut(self, number: int, torn: bytes, offset: int) -> None:
        """Take away the last line of a run that was killed while it wrote; its result is fetched again."""
        if torn[: len(_FIRST_BYTES)] != _FIRST_BYTES[: len(torn)]:
            raise NotOurs(f"line {number} of it is not a result of this script")
        self._file.truncate(offset)


def in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Results by their place in the line (0, 1, 2…); what is early waits."""
    early: dict[int, Result] = {}
    place = 0
    for own_place, result in results:
        early[own_place] = result
        while place in early:
            yield early.pop(place)
            place += 1


def _short(digest: str) -> int:
    return int(digest[:16], 16) or 1


def _line_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.readline()
