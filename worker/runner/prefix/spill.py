"""Prefixes that memory evicts are written to disk, and read back when a row begins with them.

The engine's thread hands arrays over and takes bytes back. Files are read on one thread and written on another, so
neither delays decoding, and a write does not delay a read. MLX's arrays are read here as plain memory, and the engine's
thread drops the last reference to them. When the disk fails, spilling stops for good with one log line.
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

from worker.runner.kv_segments import AttentionSegment
from worker.runner.prefix import blocks as prefix_blocks
from worker.runner.prefix.blocks import BLOCK, Block, Tensor
from worker.runner.prefix.files import PrefixFiles

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

LOOK_S = 5.0
"""Time after which the next row causes another look for what other workers have written."""
LEAST_GAIN = BLOCK // 2
"""Minimum tokens that disk must have in addition to memory, to be worth reading."""
_MOST_WRITES = 8
"""Maximum writes in progress; while the disk is slower, further prefixes are not written."""


@dataclass(slots=True)
class Fetch:
    """Blocks that are being read for a row: where each begins, and what is read, in their order."""

    owner: str
    tokens: tuple[int, ...]
    blocks: deque[tuple[int, Future[Block | None]]]


@dataclass(slots=True)
class _Write:
    """Segments on their way to disk, held until they are there."""

    segments: list[AttentionSegment]
    names: frozenset[str]
    done: Future[None]


@dataclass(slots=True)
class Spill:
    """The disk beneath the prefix cache; only the engine's thread calls it.

    Attributes:
        files: the folder.
        most_held: most bytes of evicted segments that are not written yet.
    """

    files: PrefixFiles
    most_held: int
    _writes: list[_Write] = field(default_factory=list)
    _reading: dict[str, Future[Block | None]] = field(default_factory=dict)
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefixes-read"))
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefixes-write"))
    _looked_at: float = 0.0
    _off: bool = False
    _blocks_read: int = 0
    _blocks_written: int = 0

    def open(self) -> None:
        """List what is on disk. Waits for it."""
        self._looked_at = time.monotonic()
        self._guarded(self.files.look)

    @property
    def held(self) -> int:
        """Bytes of the segments that are being written."""
        self._writes = [write for write in self._writes if not write.done.done()]
        return sum(segment.nbytes for write in self._writes for segment in write.segments)

    def has(self, name: str) -> bool:
        """Whether a block is on disk or on its way there."""
        return self.files.has(name) or any(name in write.names for write in self._writes)

    def keep(
        self, blocks: Sequence[tuple[str, int]], begin: int, segments: Sequence[AttentionSegment], *, evicted: bool
    ) -> None:
        """Write those of these blocks that are not on disk yet.

        Args:
            blocks: name and first token of each, in order.
            begin: token with which the first segment begins; no block begins before it.
            segments: what the cache has from there on, without gaps.
            evicted: memory has no other use for the segments: they are written only if not too much waits for that.
        """
        held = self.held
        if self._off or len(self._writes) >= _MOST_WRITES:
            return
        wanted = [block for block in blocks if not self.has(block[0])]
        if not wanted:
            return
        begin, needed = _from(segments, begin, wanted[0][1])
        if evicted and held + sum(segment.nbytes for segment in needed) > self.most_held:
            return
        runs = self._guarded(lambda: [segment.tensors() for segment in needed])
        if runs is None:
            return
        done = self._writer.submit(self._guarded, lambda: self._write(wanted, begin, runs))
        self._writes.append(_Write(needed, frozenset(name for name, _ in wanted), done))

    def fetch(self, owner: str, tokens: tuple[int, ...], known: int, enough: int, most_bytes: int) -> Fetch | None:
        """Start reading an owner's tokens from disk; None when it is not worth it.

        Args:
            known: number of these tokens that memory has in this owner's tree.
            enough: number of these tokens that the row can take from memory, whatever tree has them.
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
            "prefix_disk_read_blocks_total": self._blocks_read,
            "prefix_disk_written_blocks_total": self._blocks_written,
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
        self._blocks_read += block is not None
        return block

    def _write(self, wanted: Sequence[tuple[str, int]], begin: int, runs: list[Block]) -> None:
        try:
            self._blocks_written += self.files.write([(name, _block(runs, start - begin)) for name, start in wanted])
        finally:
            runs.clear()  # before the write counts as done: the engine's thread must drop the last reference

    def _guarded(self, work: Callable[[], _T]) -> _T | None:
        """Do a part of the work; when that raises, spilling stops."""
        if self._off:
            return None
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - whatever it is, rows go on without the disk
            if not self._off:
                logger.warning("prefix_disk_off", extra={"reason": str(error)})
            self._off = True
            return None


def _from(segments: Sequence[AttentionSegment], begin: int, start: int) -> tuple[int, list[AttentionSegment]]:
    """The segments that have something from token `start` on, and the token with which they begin."""
    needed = list(segments)
    while begin + needed[0].length <= start:
        begin += needed.pop(0).length
    return begin, needed


def _block(runs: Sequence[Block], start: int) -> Block:
    """The block that begins at token `start` of these consecutive runs of tokens."""
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
