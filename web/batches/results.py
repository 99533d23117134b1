"""What the lines of a batch returned, on disk, while the batch runs.

Each process that leads appends to a file of its own, so a process that no longer leads can damage nothing. An entry is
`<line> <kind> <tokens> <JSON>`: the kind is `o` for the output file and `e` for the error file. At the end, the entries
of all these files are merged into the result files. If a line has several entries, the first counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from web.batches.store import Counts
from web.files.store import PartialFile, sync_folder
from web.http.threadpool import LARGE, run_in_threadpool

_INPUT: Final = "input.jsonl"
_ENTRY: Final = re.compile(rb"(\d+) ([oe]) (\d+),(\d+),(\d+),(\d+) (\{.*\}\n)")
OUTPUT, ERROR = "o", "e"
_NONE, _COMPLETED, _FAILED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Result:
    """What a line returned.

    Attributes:
        entry: the line of the result file.
        kind: `OUTPUT` or `ERROR`.
        tokens: prompt, cached, completion and reasoning tokens.
    """

    line: int
    kind: str
    entry: Mapping[str, Any]
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)

    def encode(self) -> bytes:
        """Return the entry as it is stored."""
        tokens = ",".join(map(str, self.tokens))
        return f"{self.line} {self.kind} {tokens} {json.dumps(self.entry)}\n".encode()


class BatchFolder:
    """The folder of an unfinished batch: a link to its input, and its results."""

    def __init__(self, root: Path, batch_id: str) -> None:
        self.path = root / batch_id

    @property
    def input(self) -> Path:
        """The input file. It stays when the uploaded file is deleted."""
        return self.path / _INPUT

    def create(self, source: Path) -> None:
        """Create the folder with a link to the uploaded file.

        Raises:
            FileNotFoundError: the file was deleted meanwhile.
        """
        self.path.mkdir(mode=0o700, parents=True)
        try:
            os.link(source, self.input)
        except FileNotFoundError:
            raise
        except OSError:  # the file system has no hard links
            shutil.copyfile(source, self.input)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def parts(self) -> list[Path]:
        """Return the files with results, in the order in which they were begun."""
        return sorted(self.path.glob("part-*"))


class Results:
    """The results of a batch, as the leader sees them.

    Args:
        lines: number of lines that the input file can have.
        token: the leader's token.
        pause: called after each entry that is read, so that the process can do other things meanwhile.
    """

    def __init__(self, folder: BatchFolder, lines: int, token: str, pause: Callable[[], object] = lambda: None) -> None:
        self._folder = folder
        self._kinds = bytearray(lines + 1)
        self._token = token
        self._file: IO[bytes] | None = None
        self._size = 0
        self._tokens = [0, 0, 0, 0]
        self._completed = self._failed = 0
        for line, kind, tokens, _ in _entries(folder, pause):
            self._count(line, kind, tokens)

    def has(self, line: int) -> bool:
        """Whether a line has a result."""
        return line < len(self._kinds) and self._kinds[line] != _NONE

    def counts(self, total: int) -> Counts:
        """Return the number of lines, and the sums of their tokens."""
        return Counts(total, self._completed, self._failed, *self._tokens)

    def write(self, results: Iterable[Result]) -> None:
        """Append results. When this returns, they are on disk.

        Raises:
            OSError: the disk is full or fails. Nothing was written, and the call can be repeated.
        """
        new = [result for result in results if not self.has(result.line)]
        if not new:
            return
        data = b"".join(result.encode() for result in new)
        file = self._open()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            run_in_threadpool(LARGE, lambda: os.fsync(file.fileno()))
        except OSError:
            file.truncate(self._size)
            file.seek(self._size)
            raise
        self._size += len(data)
        for result in new:
            self._count(result.line, result.kind, result.tokens)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            path = self._folder.path / f"part-{time.time_ns():020d}-{self._token}"
            self._file = path.open("xb", buffering=0)
            sync_folder(self._folder.path)
        return self._file

    def _count(self, line: int, kind: str, tokens: Iterable[int]) -> None:
        if line >= len(self._kinds) or self._kinds[line] != _NONE:
            return
        self._kinds[line] = _COMPLETED if kind == OUTPUT else _FAILED
        self._completed += kind == OUTPUT
        self._failed += kind == ERROR
        self._tokens = [total + count for total, count in zip(self._tokens, tokens, strict=True)]


def merge(
    folder: BatchFolder, lines: int, outputs: Mapping[str, PartialFile], pause: Callable[[], object] = lambda: None
) -> None:
    """Write the results of all leaders to the result files, by kind. Raises OSError.

    Args:
        lines: number of lines that the input file can have.
    """
    merged = bytearray(lines + 1)
    for line, kind, _, entry in _entries(folder, pause):
        if line < len(merged) and not merged[line]:
            merged[line] = 1
            outputs[kind].write(entry)


def _entries(folder: BatchFolder, pause: Callable[[], object]) -> Iterator[tuple[int, str, tuple[int, ...], bytes]]:
    """Yield all complete entries. A process may have been killed while it wrote the last one of its file."""
    for part in folder.parts():
        with part.open("rb") as file:
            for raw in file:
                pause()
                if match := _ENTRY.fullmatch(raw):
                    line, kind, *tokens, entry = match.groups()
                    yield int(line), kind.decode(), tuple(map(int, tokens)), entry
