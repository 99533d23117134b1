"""The results file: one JSON object per line. A continued run reads it to find what is missing."""

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


class ResultsMismatch(Exception):
    """The results file cannot be continued. The message says why and follows the name of the file."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one line. `status` is the job's, or `rejected` if the service did not accept it."""

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
    regions: list[dict[str, Any]] | None = None
    parse_error: str | None = None
    message: dict[str, Any] | None = None
    response: dict[str, Any] | None = None
    """The whole response, for requests in OpenAI's format."""

    @property
    def succeeded(self) -> bool:
        """Whether the job succeeded."""
        return self.status == SUCCEEDED

    def to_line(self) -> bytes:
        """Return the line for the file."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        for name in ("actions", "regions", "message", "response"):  # those that the request did not ask for
            if fields[name] is None:
                del fields[name]
        if self.actions is None and self.regions is None:
            del fields["parse_error"]
        # A lone surrogate has no UTF-8 encoding; the backslash escape is its form in JSON.
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Parse a line that `to_line` wrote.

        Raises:
            ValueError: it is not such a line.
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
    """Positions of the results by line, with 17 bytes per line: files may have millions of lines."""

    def __init__(self) -> None:
        self._digests = array("Q")  # the first 64 bits of the prompt's digest; 0: no result
        self._offsets = array("Q")
        self._failed = bytearray()
        self._highest = 0
        self.count = 0
        self.ordered = True
        """Whether the results are in the order of the prompts."""
        self.superseded = False
        """Whether the file still contains a result that a retry has replaced."""

    def add(self, result: Result, offset: int) -> None:
        """Add a result; it replaces an earlier one of the same line."""
        line = result.line
        self._extend_to(line)
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
        """Return whether the prompt has a result.

        Raises:
            ResultsMismatch: the line has a result of another prompt.
        """
        known = self._digests[prompt.line] if prompt.line < len(self._digests) else 0
        if known and known != _short(prompt.digest):
            raise ResultsMismatch(f"has a result of a different request for line {prompt.line}")
        return known != 0

    def offset(self, line: int) -> int:
        """Return the offset of the result of a line that has one."""
        return self._offsets[line]

    def offsets_by_line(self) -> Iterator[int]:
        """Return the offsets of the current results in the order of the prompts."""
        return (offset for offset, known in zip(self._offsets, self._digests, strict=True) if known)

    def has_failed(self, line: int) -> bool:
        """Whether the line has a failed result."""
        return line < len(self._failed) and bool(self._failed[line])

    def _extend_to(self, line: int) -> None:
        missing = line + 1 - len(self._digests)
        if missing > 0:
            self._digests.extend(array("Q", bytes(8 * missing)))
            self._offsets.extend(array("Q", bytes(8 * missing)))
            self._failed.extend(bytes(missing))


class ResultFile:
    """A results file, locked against other runs while it is open."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, remove an incomplete last line, and index the results.

        Raises:
            ResultsMismatch: it contains something else, or another run has locked it.
            OSError: it cannot be read or written.
        """
        self.path = path
        # Unbuffered: each result is one write, so a kill can leave at most the last line incomplete.
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
        """Append a result."""
        line = result.to_line()
        offset = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) != len(line):
            raise OSError(f"no space left for the result of line {result.line} in {self.path}")
        self.index.add(result, offset)

    def read(self, line: int) -> Result:
        """Return the result of a line that has one."""
        with self.path.open("rb") as file:
            return Result.from_line(_line_at(file, self.index.offset(line)))

    def compact(self, *, in_order: bool) -> None:
        """Remove results that a retry has replaced; sort the lines if `in_order` is set."""
        if not self.index.superseded and (self.index.ordered or not in_order):
            return
        compacted = self.path.with_name(f".{self.path.name}.compact")
        with self.path.open("rb") as old, compacted.open("wb") as new:
            for offset in self.index.offsets_by_line():
                new.write(_line_at(old, offset))
            new.flush()
            os.fsync(new.fileno())
        compacted.replace(self.path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultsMismatch("is in use by another run") from error

    def _read(self) -> Index:
        index, offset = Index(), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._truncate(number, line, offset)
                    break
                try:
                    index.add(Result.from_line(line), offset)
                except ValueError as error:
                    raise ResultsMismatch(f"contains something else than results in line {number}") from error
                offset += len(line)
        return index

    def _truncate(self, number: int, incomplete: bytes, offset: int) -> None:
        """Remove an incomplete last line, written by a run that was killed. Its result is fetched again."""
        if incomplete[: len(_FIRST_BYTES)] != _FIRST_BYTES[: len(incomplete)]:
            raise ResultsMismatch(f"contains something else than results in line {number}")
        self._file.truncate(offset)


def in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Generate results in the order of their index (0, 1, 2…); hold back those that are early."""
    early: dict[int, Result] = {}
    next_index = 0
    for index, result in results:
        early[index] = result
        while next_index in early:
            yield early.pop(next_index)
            next_index += 1


def _short(digest: str) -> int:
    return int(digest[:16], 16) or 1


def _line_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.readline()
