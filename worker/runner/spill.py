"""What memory gives up of prefixes goes to disk, and comes back when a row begins with it.

The engine's thread hands arrays over and takes bytes back; files are read on one thread and written on another, so
neither holds the rows that decode, nor a read a write. MLX's arrays are read here through plain memory, and the last
reference to them is dropped by the engine's thread. When the disk fails, this goes off, with one line.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from worker.runner import prefix_blocks
from worker.runner.kv_segments import Columns
from worker.runner.prefix_blocks import BLOCK, Block, Tensor
from worker.runner.prefix_files import PrefixFiles

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

LOOK_S = 5.0
"""After so long it is looked what other workers have written, when a row might have use for it."""
LEAST_GAIN = BLOCK // 2
"""Tokens that disk must have beyond memory, to be read."""
_MOST_WRITES = 8
"""Prefixes on their way to disk; further ones are not written when the disk is slower than that."""


@dataclass(slots=True)
class Fetch:
    """Blocks that are being read for a row: where each begins, and what is read, in their order."""

    owner: str
    tokens: tuple[int, ...]
    blocks: deque[tuple[int, Future[Block | None]]]


@dataclass(slots=True)
class _Write:
    """Pieces on their way to disk, held until they are there."""

    pieces: list[Columns]
    names: frozenset[str]
    done: Future[None]


@dataclass(slots=True)
class Totals:
    """What was read and written, in blocks."""

    read: int = 0
    written: int = 0


@dataclass(slots=True)
class Spill:
    """The disk beneath a cache of prefixes; only the engine's thread calls it.

    Attributes:
        files: the folder.
        most_held: bytes of pieces that memory has given up and that are not written yet.
    """

    files: PrefixFiles
    most_held: int
    totals: Totals = field(default_factory=Totals)
    _writes: list[_Write] = field(default_factory=list)
    _reading: dict[str, Future[Block | None]] = field(default_factory=dict)
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefixes-read"))
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefixes-write"))
    _looked_at: float = 0.0
    _off: bool = False

    def open(self) -> None:
        """See what is there. Waits for it."""
        self._looked_at = time.monotonic()
        self._guarded(self.files.look)

    @property
    def held(self) -> int:
        """Bytes of the pieces that are being written."""
        self._writes = [write for write in self._writes if not write.done.done()]
        return sum(piece.nbytes for write in self._writes for piece in write.pieces)

    def keep(self, owner: str, tokens: tuple[int, ...], pieces: Sequence[Columns], *, given_up: bool = False) -> None:
        """Write what is not on disk yet of these tokens, whose cache from the first token on is in these pieces.

        Args:
            given_up: memory has no other use for them: they are only written if not too much waits for that.
        """
        held = self.held
        if self._off or len(self._writes) >= _MOST_WRITES:
            return
        coming = frozenset[str]().union(*(write.names for write in self._writes))
        wanted = [
            (name, place * BLOCK)
            for place, name in enumerate(prefix_blocks.names(owner, tokens))
            if not self.files.has(name) and name not in coming
        ]
        if not wanted:
            return
        begin, needed = _from(pieces, wanted[0][1])
        if given_up and held + sum(piece.nbytes for piece in needed) > self.most_held:
            return
        runs = self._guarded(lambda: [piece.tensors() for piece in needed])
        if runs is None:
            return
        done = self._writer.submit(self._guarded, lambda: self._write(wanted, begin, runs))
        self._writes.append(_Write(needed, frozenset(name for name, _ in wanted), done))

    def fetch(self, owner: str, tokens: tuple[int, ...], known: int, enough: int, most_bytes: int) -> Fetch | None:
        """Begin to read what disk has of an owner's tokens; None when that is not worth it.

        Args:
            known: so many of them memory has.
            enough: so many of them need not be read anyway.
        """
        if self._off or len(tokens) - enough < LEAST_GAIN:
            return None
        self._look_again()
        names: list[str] = []
        for name in prefix_blocks.names(owner, tokens):
            needed = (len(names) + 1) * BLOCK > known
            if needed and (not self.files.has(name) or (most_bytes := most_bytes - self.files.size(name)) < 0):
                break
            names.append(name)
        if len(names) * BLOCK - enough < LEAST_GAIN:
            return None
        first = known // BLOCK
        blocks = deque((place * BLOCK, self._read(name)) for place, name in enumerate(names) if place >= first)
        self._reader.submit(self._guarded, lambda: self.files.touch(names))
        return Fetch(owner, tokens, blocks)

    def close(self, seconds: float) -> None:
        """Wait so long for what is being written."""
        wait([write.done for write in self._writes], seconds)
        self._off = True
        for threads in (self._reader, self._writer):
            threads.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for `/metrics`."""
        return {
            "prefix_disk_bytes": self.files.nbytes,
            "prefix_disk_read_blocks_total": self.totals.read,
            "prefix_disk_written_blocks_total": self.totals.written,
        }

    def _look_again(self) -> None:
        if time.monotonic() - self._looked_at > LOOK_S:
            self._looked_at = time.monotonic()
            self._writer.submit(self._guarded, self.files.look)

    def _read(self, name: str) -> Future[Block | None]:
        """Rows that come at once wait for the same read."""
        if (under_way := self._reading.get(name)) is not None:
            return under_way
        future = self._reading[name] = self._reader.submit(self._read_block, name)
        future.add_done_callback(lambda _: self._reading.pop(name, None))
        return future

    def _read_block(self, name: str) -> Block | None:
        block = self._guarded(lambda: self.files.read(name))
        self.totals.read += block is not None
        return block

    def _write(self, wanted: Sequence[tuple[str, int]], begin: int, runs: list[Block]) -> None:
        try:
            self.totals.written += self.files.write([(name, _block(runs, start - begin)) for name, start in wanted])
        finally:
            runs.clear()  # before it counts as done: the engine's thread is to have the last reference

    def _guarded(self, work: Callable[[], _T]) -> _T | None:
        """Do a part of this; when it cannot be done, now is the end of all of it."""
        if self._off:
            return None
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - whatever is raised, rows go on without
            if not self._off:
                logger.warning("prefixes are not kept on disk from now on: %s", error)
            self._off = True
            return None


def _from(pieces: Sequence[Columns], start: int) -> tuple[int, list[Columns]]:
    """Those of the pieces that have something from this token on, and the token that they begin with."""
    begin, needed = 0, list(pieces)
    while begin + needed[0].length <= start:
        begin += needed.pop(0).length
    return begin, needed


def _block(runs: Sequence[Block], start: int) -> Block:
    """The block that begins there, out of runs of tokens that follow each other."""
    parts, begin = [], 0
    for run in runs:
        length = run[0].shape[2]
        low, high = max(start - begin, 0), min(start + BLOCK - begin, length)
        if low < high:
            parts.append([_cut(tensor, low, high) for tensor in run])
        begin += length
    return [_joined(tensors) for tensors in zip(*parts, strict=True)]


def _cut(tensor: Tensor, low: int, high: int) -> Tensor:
    rows, heads, length, *rest = tensor.shape
    data = tensor.data.reshape(rows * heads, length, -1)[:, low:high]
    return Tensor(tensor.dtype, (rows, heads, high - low, *rest), data)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    data: Any = np.concatenate([tensor.data for tensor in tensors], axis=1)
    rows, heads, _, *rest = tensors[0].shape
    return Tensor(tensors[0].dtype, (rows, heads, data.shape[1], *rest), data.reshape(-1))
