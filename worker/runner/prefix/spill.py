"""Writes prefixes that memory evicts to disk, and reads them back when a row begins with them.

The engine thread passes arrays in and gets bytes back. One thread reads files and another one writes them, so neither
delays decoding, and writes do not delay reads. The writing thread accesses MLX arrays as plain memory, and the engine
thread drops the last reference to them. If the disk fails, spilling is disabled with one log line.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from worker.runner.kv_segments import Checkpoint, Layout, Segment
from worker.runner.prefix import blocks as prefix_blocks
from worker.runner.prefix.blocks import BLOCK, Block, BlockChain, Tensor
from worker.runner.prefix.files import PrefixFiles

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

REFRESH_S = 5.0
"""Minimum seconds between two listings of the folder, which find blocks that other workers have written."""
MIN_GAIN = BLOCK // 2
"""Minimum number of tokens that reading from disk must add to those in memory."""
_MAX_WRITES = 8
"""Maximum pending writes. Further prefixes are not written until the disk has caught up."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a file holds: the columns of tokens `start` to `stop`, and perhaps the recurrent state after them."""

    name: str
    start: int
    stop: int
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """A file that is being read."""

    start: int
    stop: int
    content: Future[Block | None]


@dataclass(slots=True)
class Fetch:
    """Files that are being read for a row.

    Attributes:
        tokens: the tokens of the row.
        pieces: in order; at most the last one is a checkpoint.
    """

    owner: str
    tokens: tuple[int, ...]
    pieces: deque[ReadPiece]


@dataclass(slots=True)
class _Write:
    """Segments and checkpoints that are being written, and kept in memory until then."""

    parts: list[Segment | Checkpoint]
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
    _erasures: list[Future[None]] = field(default_factory=list)
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
        """Bytes of the prefixes that are being written."""
        self._writes = [write for write in self._writes if not write.done.done()]
        return sum(part.nbytes for write in self._writes for part in write.parts)

    def has(self, name: str) -> bool:
        """Return whether a block is on disk or is being written."""
        return self.files.has(name) or any(name in write.names for write in self._writes)

    def erase(self, cutoffs: Mapping[str, float]) -> None:
        """Delete the files of owners that were not used after a time, by owner, after the pending writes."""
        self._erasures = [each for each in self._erasures if not each.done()]
        self._erasures.append(self._writer.submit(self._guarded, lambda: self.files.erase(cutoffs)))

    def write(
        self, pieces: Sequence[Piece], begin: int, segments: Sequence[Segment], used_at: float, *, evicted: bool
    ) -> None:
        """Start writing the files that are not on disk yet.

        Args:
            pieces: what to write, in order.
            begin: index of the first token of the first segment; no piece begins before it.
            segments: consecutive segments that cover all pieces.
            used_at: when a row last used all of the pieces.
            evicted: the pieces are held in memory only for this write; skip it if it would exceed `max_pending_bytes`.
        """
        pending_bytes = self.pending_bytes
        if self._disabled or len(self._writes) >= _MAX_WRITES:
            return
        missing = [piece for piece in pieces if not self.has(piece.name)]
        if not missing:
            return
        begin, needed = _from(segments, begin, missing[0].start)
        parts: list[Segment | Checkpoint] = [*needed, *(piece.checkpoint for piece in missing if piece.checkpoint)]
        if evicted and pending_bytes + sum(part.nbytes for part in parts) > self.max_pending_bytes:
            return
        runs = self._guarded(lambda: [(segment.length, segment.tensors()) for segment in needed])
        states = self._guarded(lambda: [piece.checkpoint.tensors() if piece.checkpoint else [] for piece in missing])
        if runs is None or states is None:
            return
        # The writing thread must not hold a checkpoint: the engine thread must drop the last reference.
        ranges = [(piece.name, piece.start - begin, piece.stop - begin) for piece in missing]
        done = self._writer.submit(self._guarded, lambda: self._write_ranges(ranges, runs, states, used_at))
        self._writes.append(_Write(parts, frozenset(piece.name for piece in missing), done))

    def fetch(
        self, owner: str, tokens: tuple[int, ...], known: int, in_memory: int, max_bytes: int, layout: Layout
    ) -> Fetch | None:
        """Start reading an owner's tokens from disk; None if that is not worthwhile.

        Args:
            known: number of these tokens that are in memory in this owner's tree.
            in_memory: number of these tokens that the row can reuse from memory, from any tree.
            max_bytes: maximum bytes to read.
            layout: what files of this model hold.
        """
        if self._disabled or len(tokens) - in_memory < MIN_GAIN:
            return None
        self._refresh()
        blocks, checkpoint = [], None
        for each in BlockChain.of(owner).chain_of(tokens):
            needed = each.start > known and layout.attention
            if needed and (not self.files.has(each.name) or (max_bytes := max_bytes - self.files.size(each.name)) < 0):
                break
            blocks += [Piece(each.name, each.start - BLOCK, each.start)] if each.start else []
            checkpoint = self._checkpoint_after(each, tokens) or checkpoint
        return self._start(owner, tokens, known, in_memory, _wanted(blocks, checkpoint, layout))

    def _start(
        self, owner: str, tokens: tuple[int, ...], known: int, in_memory: int, pieces: list[Piece]
    ) -> Fetch | None:
        if not pieces or pieces[-1].stop - in_memory < MIN_GAIN:
            return None
        missing = [piece for piece in pieces if piece.stop > known or piece is pieces[-1]]
        reads = deque(ReadPiece(each.start, each.stop, self._read(each.name)) for each in missing)
        self._reader.submit(self._guarded, lambda: self.files.touch([piece.name for piece in pieces]))
        return Fetch(owner, tokens, reads)

    def _checkpoint_after(self, chain: BlockChain, tokens: Sequence[int]) -> Piece | None:
        """Return the last checkpoint of these tokens after the last block of a chain and before the next one."""
        found = None
        for name in self.files.checkpoints(chain.name):
            stop = chain.start + prefix_blocks.split_name(name)[1]
            later = found is None or stop > found.stop
            if later and stop <= len(tokens) and chain.after(tokens[chain.start : stop]).checkpoint_name == name:
                found = Piece(name, chain.start, stop)
        return found

    def close(self, seconds: float) -> None:
        """Wait for pending writes and erasures, at most this long, and stop."""
        wait([*(write.done for write in self._writes), *self._erasures], seconds)
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

    def _write_ranges(
        self,
        ranges: Sequence[tuple[str, int, int]],
        runs: list[tuple[int, Block]],
        states: list[Block],
        used_at: float,
    ) -> None:
        try:
            files = [
                (name, [*_cut(runs, start, stop), *state])
                for (name, start, stop), state in zip(ranges, states, strict=True)
            ]
            self._blocks_written += self.files.write(files, used_at)
        finally:
            # Before the write counts as done, because the engine thread must drop the last reference.
            files = []
            runs.clear()
            states.clear()

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


def _wanted(blocks: list[Piece], checkpoint: Piece | None, layout: Layout) -> list[Piece]:
    """Return the files to read: the blocks; in a model with recurrent layers, up to the checkpoint and with it."""
    if not layout.recurrent:
        return blocks
    if checkpoint is None:
        return []
    if not layout.attention:
        return [Piece(checkpoint.name, 0, checkpoint.stop)]
    return [*(block for block in blocks if block.stop <= checkpoint.start), checkpoint]


def _from(segments: Sequence[Segment], begin: int, start: int) -> tuple[int, list[Segment]]:
    """Return the segments that end after token `start`, at least one, and the index of their first token."""
    needed = list(segments)
    while len(needed) > 1 and begin + needed[0].length <= start:
        begin += needed.pop(0).length
    return begin, needed


def _cut(runs: Sequence[tuple[int, Block]], start: int, stop: int) -> Block:
    """Return tokens `start` to `stop` of consecutive runs of tokens.

    A tensor of a run may lack the first tokens; then the result lacks them, too.
    """
    return [_cut_tensor(runs, index, start, stop) for index in range(len(runs[0][1]))] if runs else []


def _cut_tensor(runs: Sequence[tuple[int, Block]], index: int, start: int, stop: int) -> Tensor:
    parts: list[Tensor] = []
    end = sum(length for length, _ in runs)
    for length, tensors in reversed(runs):
        tensor = tensors[index]
        first = end - tensor.shape[2]
        low, high = max(start, first), min(stop, end)
        if low < high:
            parts.insert(0, _columns(tensor, low - first, high - first))
        end -= length
        if first > end:  # columns are missing
            break
    return _joined(parts) if parts else _columns(runs[-1][1][index], 0, 0)


def _columns(tensor: Tensor, low: int, high: int) -> Tensor:
    rows, heads, length, *rest = tensor.shape
    width = tensor.data.size // max(rows * heads * length, 1)  # 0 where a layer caches keys without values
    data = tensor.data.reshape(rows * heads, length, width)[:, low:high]
    return Tensor(tensor.dtype, (rows, heads, high - low, *rest), data)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    data: Any = np.concatenate([tensor.data for tensor in tensors], axis=1)
    rows, heads, _, *rest = tensors[0].shape
    return Tensor(tensors[0].dtype, (rows, heads, data.shape[1], *rest), data.reshape(-1))
