"""Writes prefixes that memory evicts to disk, and reads them back when a row begins with them.

The engine thread passes arrays in and gets bytes back. One thread reads files and another one writes them, so neither
delays decoding, and writes do not delay reads. The writing thread accesses MLX arrays as plain memory, and the engine
thread drops the last reference to them. If the disk fails, spilling is disabled with one log line.
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

REFRESH_S = 5.0
"""Minimum seconds between two listings of the folder, which find blocks that other workers have written."""
MIN_GAIN = BLOCK // 2
"""Minimum number of tokens that reading from disk must add to those in memory."""
_MAX_WRITES = 8
"""Maximum pending writes. Further prefixes are not written until the disk has caught up."""


@dataclass(slots=True)
class Fetch:
    """Blocks that are being read for a row.

    Attributes:
        tokens: the tokens of the row.
        blocks: first token and content of each block, in order.
    """

    owner: str
    tokens: tuple[int, ...]
    blocks: deque[tuple[int, Future[Block | None]]]


@dataclass(slots=True)
class _Write:
    """Segments that are being written, and kept in memory until then."""

    segments: list[AttentionSegment]
    names: frozenset[str]
    done: Future[None]


@dataclass(slots=True)
class Spill:
    """The disk store of a prefix cache. Only the engine thread may call it.

    Attributes:
        files: the folder.
        max_pending_bytes: maximum bytes of evicted segments that wait to be written.
    """

    files: PrefixFiles
    max_pending_bytes: int
    _writes: list[_Write] = field(default_factory=list)
    _reading: dict[str, Future[Block | None]] = field(default_factory=dict)
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefixes-read"))
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prefixes-write"))
    _refreshed_at: float = 0.0
    _disabled: bool = False
    _blocks_read: int = 0
    _blocks_written: int = 0

    def open(self) -> None:
        """List the blocks on disk. Waits for the disk."""
        self._refreshed_at = time.monotonic()
        self._guarded(self.files.refresh)

    @property
    def pending_bytes(self) -> int:
        """Bytes of the segments that are being written."""
        self._writes = [write for write in self._writes if not write.done.done()]
        return sum(segment.nbytes for write in self._writes for segment in write.segments)

    def has(self, name: str) -> bool:
        """Return whether a block is on disk or is being written."""
        return self.files.has(name) or any(name in write.names for write in self._writes)

    def write(
        self, blocks: Sequence[tuple[str, int]], begin: int, segments: Sequence[AttentionSegment], *, evicted: bool
    ) -> None:
        """Start writing the blocks that are not on disk yet.

        Args:
            blocks: name and index of the first token of each block, in order.
            begin: index of the first token of the first segment; no block begins before it.
            segments: consecutive segments that cover all blocks.
            evicted: the segments are held in memory only for this write; skip it if it would exceed
                `max_pending_bytes`.
        """
        pending_bytes = self.pending_bytes
        if self._disabled or len(self._writes) >= _MAX_WRITES:
            return
        missing = [block for block in blocks if not self.has(block[0])]
        if not missing:
            return
        begin, needed = _from(segments, begin, missing[0][1])
        if evicted and pending_bytes + sum(segment.nbytes for segment in needed) > self.max_pending_bytes:
            return
        runs = self._guarded(lambda: [segment.tensors() for segment in needed])
        if runs is None:
            return
        done = self._writer.submit(self._guarded, lambda: self._write_blocks(missing, begin, runs))
        self._writes.append(_Write(needed, frozenset(name for name, _ in missing), done))

    def fetch(self, owner: str, tokens: tuple[int, ...], known: int, in_memory: int, max_bytes: int) -> Fetch | None:
        """Start reading an owner's tokens from disk; None if that is not worthwhile.

        Args:
            known: number of these tokens that are in memory in this owner's tree.
            in_memory: number of these tokens that the row can reuse from memory, from any tree.
            max_bytes: maximum bytes to read.
        """
        if self._disabled or len(tokens) - in_memory < MIN_GAIN:
            return None
        self._refresh()
        names: list[str] = []
        for name in prefix_blocks.names(owner, tokens):
            needed = (len(names) + 1) * BLOCK > known
            if needed and (not self.files.has(name) or (max_bytes := max_bytes - self.files.size(name)) < 0):
                break
            names.append(name)
        if len(names) * BLOCK - in_memory < MIN_GAIN:
            return None
        first = known // BLOCK
        blocks = deque((index * BLOCK, self._read(name)) for index, name in enumerate(names) if index >= first)
        self._reader.submit(self._guarded, lambda: self.files.touch(names))
        return Fetch(owner, tokens, blocks)

    def close(self, seconds: float) -> None:
        """Wait for pending writes, at most this long, and stop."""
        wait([write.done for write in self._writes], seconds)
        self._disabled = True
        for threads in (self._reader, self._writer):
            threads.shutdown(wait=False, cancel_futures=True)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for `/metrics`."""
        return {
            "prefix_disk_bytes": self.files.nbytes,
            "prefix_disk_read_blocks_total": self._blocks_read,
            "prefix_disk_written_blocks_total": self._blocks_written,
        }

    def _refresh(self) -> None:
        if time.monotonic() - self._refreshed_at > REFRESH_S:
            self._refreshed_at = time.monotonic()
            self._writer.submit(self._guarded, self.files.refresh)

    def _read(self, name: str) -> Future[Block | None]:
        """Start reading a block, or return the read that another row has already started."""
        if (started := self._reading.get(name)) is not None:
            return started
        future = self._reading[name] = self._reader.submit(self._read_block, name)
        future.add_done_callback(lambda _: self._reading.pop(name, None))
        return future

    def _read_block(self, name: str) -> Block | None:
        block = self._guarded(lambda: self.files.read(name))
        self._blocks_read += block is not None
        return block

    def _write_blocks(self, missing: Sequence[tuple[str, int]], begin: int, runs: list[Block]) -> None:
        try:
            self._blocks_written += self.files.write([(name, _block(runs, start - begin)) for name, start in missing])
        finally:
            runs.clear()  # before the write counts as done, because the engine thread must drop the last reference

    def _guarded(self, work: Callable[[], _T]) -> _T | None:
        """Call a function. If it raises, disable spilling and return None."""
        if self._disabled:
            return None
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - after any error, rows continue without the disk
            if not self._disabled:
                logger.warning("prefix_disk_off", extra={"reason": str(error)})
            self._disabled = True
            return None


def _from(segments: Sequence[AttentionSegment], begin: int, start: int) -> tuple[int, list[AttentionSegment]]:
    """Return the segments that end after token `start`, and the index of their first token."""
    needed = list(segments)
    while begin + needed[0].length <= start:
        begin += needed.pop(0).length
    return begin, needed


def _block(runs: Sequence[Block], start: int) -> Block:
    """Return the block that begins at token `start` of these consecutive runs of tokens."""
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
