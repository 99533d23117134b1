"""The folder of stored prefixes: one subfolder per model, one file per block or checkpoint.

All workers with the same DATA_DIR share it. A process holds a lock while it writes or deletes; the lock ends with the
process. A file gets its name only when it is complete, so readers need no lock, and the next writer deletes the partial
files of a crash. The folder stays below its limit and leaves some disk space free. The least recently used files of all
models are deleted first, and files that were not used for a while are deleted in any case.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from worker.runner.prefix import blocks as prefix_blocks
from worker.runner.prefix.blocks import Block, BrokenBlock

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_PARTIAL = ".half"
FREE_BYTES = 2**30
"""Disk space to leave free: the queue may be on the same disk, and needs it more."""

_SAMPLES = 64
_SAMPLE_BYTES = 2**12


@dataclass(frozen=True, slots=True)
class _Entry:
    used_ns: int
    size: int
    path: str


class PrefixFiles:
    """The files of one model. All methods but `has`, `size` and `checkpoints` access the disk and may block.

    Args:
        folder: the folder of all models; created if it is missing.
        model: identifies the model and the layout of its cache; see `fingerprint`.
        max_bytes: maximum bytes of the folder.
        keep_s: files that were not used for longer than this are deleted.

    Attributes:
        nbytes: bytes of all files in the folder when it was last listed, plus files written since.
    """

    def __init__(self, folder: Path, model: str, max_bytes: int, keep_s: float) -> None:
        self._root = folder
        self._own = folder / model
        self._max_bytes = max_bytes
        self._keep_ns = int(keep_s * 1e9)
        self._sizes: dict[str, int] = {}
        self._checkpoints: dict[str, list[str]] = {}
        self.nbytes = 0

    def has(self, name: str) -> bool:
        """Return whether a block was on disk when the folder was last listed, or was written since."""
        return name in self._sizes

    def size(self, name: str) -> int:
        """Return the bytes of a block; 0 if it is not on disk."""
        return self._sizes.get(name, 0)

    def checkpoints(self, block: str) -> list[str]:
        """Return the names of the checkpoints between a block, given by name, and the next one."""
        return [name for name in self._checkpoints.get(block, ()) if name in self._sizes]

    def refresh(self) -> None:
        """List all blocks, including those of other processes, and delete expired files and files over the limit."""
        with self._lock():
            self._trim(0)

    def erase(self, cutoffs: Mapping[str, float]) -> None:
        """Delete the blocks of owners, of all models, that were not used after a time, by owner."""
        with self._lock():
            erase(self._root, cutoffs)
            self._trim(0)

    def write(self, blocks: Sequence[tuple[str, Block]], used_at: float | None = None) -> int:
        """Write the blocks that are missing, in order, as many as fit.

        Earlier blocks of a prefix are marked as used later than the blocks after them, so they are deleted last.

        Args:
            used_at: when a row last used the blocks that are missing, in seconds since the epoch; None: now.

        Returns:
            The number of blocks written.
        """
        with self._lock():
            new = [(name, block) for name, block in blocks if not self._path(name).exists()]
            sizes = [prefix_blocks.size(name, block) for name, block in new]
            while sum(sizes) > self._max_bytes:
                sizes.pop()
            self._trim(sum(sizes))
            before = len(self._sizes)
            for (name, block), size in zip(new, sizes, strict=False):
                if self._fits(size):
                    self._add(name, block, size)
            written = {name for name, _ in new}
            self.touch([name for name, _ in blocks if used_at is None or name in written], used_at)
        return len(self._sizes) - before

    def read(self, name: str) -> Block | None:
        """Read a block; None if it was deleted or is broken. Deletes a broken block."""
        try:
            return prefix_blocks.read(self._path(name), name)
        except FileNotFoundError:
            pass
        except (BrokenBlock, OSError) as error:
            logger.warning("prefix_block_broken", extra={"reason": str(error)})
            self._path(name).unlink(missing_ok=True)
        self._sizes.pop(name, None)
        return None

    def touch(self, names: Sequence[str], used_at: float | None = None) -> None:
        """Mark consecutive blocks as used at a time, in seconds since the epoch; None: now."""
        now = time.time_ns() if used_at is None else int(used_at * 1e9)
        for index, name in enumerate(names):
            try:
                os.utime(self._path(name), ns=(now - index * 1000, now - index * 1000))
            except FileNotFoundError:
                self._sizes.pop(name, None)

    def _path(self, name: str) -> Path:
        return self._own / (name + SUFFIX)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        for folder in (self._root, self._own):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _add(self, name: str, block: Block, size: int) -> None:
        partial = self._path(name).with_suffix(_PARTIAL)
        prefix_blocks.write(partial, name, block)
        partial.replace(self._path(name))
        self._sizes[name] = size
        self._note_checkpoint(self._checkpoints, name)
        self.nbytes += size

    def _fits(self, size: int) -> bool:
        return self.nbytes + size <= self._limit()

    def _limit(self) -> int:
        """Return the bytes that the folder may hold now, given the free disk space."""
        return min(self._max_bytes, self.nbytes + shutil.disk_usage(self._root).free - FREE_BYTES)

    def _trim(self, needed: int) -> None:
        """Delete files until `needed` more bytes fit. Needs the lock, because it deletes partial files as well."""
        entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
        self.nbytes = sum(entry.size for entry in entries)
        limit, oldest = max(0, self._limit() - needed), time.time_ns() - self._keep_ns
        kept = []
        for entry in entries:
            if self.nbytes > limit or entry.used_ns < oldest:
                Path(entry.path).unlink(missing_ok=True)
                self.nbytes -= entry.size
            else:
                kept.append(entry)
        paths = ((Path(entry.path), entry.size) for entry in kept)
        self._sizes = {path.stem: size for path, size in paths if path.parent == self._own}
        checkpoints: dict[str, list[str]] = {}
        for name in self._sizes:
            self._note_checkpoint(checkpoints, name)
        self._checkpoints = checkpoints

    @staticmethod
    def _note_checkpoint(checkpoints: dict[str, list[str]], name: str) -> None:
        if prefix_blocks.is_checkpoint(name):
            checkpoints.setdefault(prefix_blocks.split_name(name)[0], []).append(name)

    def _entries(self) -> Iterator[_Entry]:
        for folder in self._root.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                try:
                    stat = path.stat()
                except FileNotFoundError:  # another process found it broken and deleted it
                    continue
                if path.suffix == SUFFIX and not prefix_blocks.owner_of(path.stem):
                    path.unlink(missing_ok=True)  # no process of this version finds a file of an earlier one
                elif path.suffix == SUFFIX:
                    yield _Entry(stat.st_mtime_ns, stat.st_size, str(path))
                elif path.suffix == _PARTIAL:
                    path.unlink(missing_ok=True)


def erase(root: Path, cutoffs: Mapping[str, float]) -> None:
    """Delete the blocks of owners in the folder of all models that were not used after a time, by owner."""
    for path in root.glob(f"*/*{SUFFIX}"):
        cutoff = cutoffs.get(prefix_blocks.owner_of(path.stem))
        with suppress(FileNotFoundError):
            if cutoff is not None and path.stat().st_mtime <= cutoff:
                path.unlink()


def fingerprint(folder: Path, layout: str, config: str = "config.json") -> str:
    """Return a hash of a model's weights and quantisation and of the layout of its cache on this device.

    For each weight file it includes the size, the modification time, and samples of the content.

    Args:
        layout: everything else that the content of a cache depends on.
        config: name of the configuration file in the folder.
    """
    running = hashlib.sha256(f"{layout} {version('mlx')} {version('mlx-lm')} {prefix_blocks.BLOCK}".encode())
    running.update((folder / config).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            running.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            for sample in range(_SAMPLES):
                file.seek(stat.st_size * sample // _SAMPLES)
                running.update(file.read(_SAMPLE_BYTES))
    return running.hexdigest()[:32]
