"""The folder of prefixes that outlive a worker: a subfolder for each model, a file for each block.

Workers of one DATA_DIR share it. A process that writes or deletes holds its lock, which ends with the process. Files
appear under their names whole, so a reader needs no lock; the next writer deletes what a crash left half written. The
whole folder stays under its limit and leaves the disk some room: the least recently used files of all models go first,
and files that were not used for a while go in any case.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from worker.runner.prefix import blocks as prefix_blocks
from worker.runner.prefix.blocks import Block, BrokenBlock

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_HALF = ".half"
ROOM_BYTES = 2**30
"""The disk keeps so much free: the queue may be on the same one, and needs it more."""

_SAMPLES = 64
_SAMPLE_BYTES = 2**12


@dataclass(frozen=True, slots=True)
class _Entry:
    used_ns: int
    size: int
    path: str


class PrefixFiles:
    """Blocks of one model in the folder. All but `has` is file work, for threads that may wait.

    Args:
        folder: of all models; made if it is not there.
        model: distinguishes this model and its layout from every other, as `fingerprint` does.
        most_bytes: what the folder may hold.
        keep_s: files that were not used for longer are deleted.
    """

    def __init__(self, folder: Path, model: str, most_bytes: int, keep_s: float) -> None:
        self._root = folder
        self._own = folder / model
        self._most_bytes = most_bytes
        self._keep_ns = int(keep_s * 1e9)
        self._sizes: dict[str, int] = {}
        self.nbytes = 0

    def has(self, name: str) -> bool:
        """Whether there is such a block, as far as known."""
        return name in self._sizes

    def size(self, name: str) -> int:
        """Bytes of a block that there is."""
        return self._sizes.get(name, 0)

    def look(self) -> None:
        """List all blocks, also those of other processes, and delete what is too old or over the limit."""
        with self._alone():
            self._trim(0)

    def write(self, blocks: Sequence[tuple[str, Block]]) -> int:
        """Write the blocks that are missing, in order, as far as they fit; how many were written.

        Earlier blocks of a prefix count as used later than the blocks after them, so they are deleted last.
        """
        with self._alone():
            new = [(name, block) for name, block in blocks if not self._path(name).exists()]
            sizes = [prefix_blocks.size(name, block) for name, block in new]
            while sum(sizes) > self._most_bytes:
                sizes.pop()
            self._trim(sum(sizes))
            before = len(self._sizes)
            for (name, block), size in zip(new, sizes, strict=False):
                if self._has_room(size):
                    self._add(name, block, size)
            self.touch([name for name, _ in blocks])
        return len(self._sizes) - before

    def read(self, name: str) -> Block | None:
        """A block; None when it is gone, or broken, which deletes it."""
        try:
            return prefix_blocks.read(self._path(name), name)
        except FileNotFoundError:
            pass
        except (BrokenBlock, OSError) as error:
            logger.warning("prefix_block_broken", extra={"reason": str(error)})
            self._path(name).unlink(missing_ok=True)
        self._sizes.pop(name, None)
        return None

    def touch(self, names: Sequence[str]) -> None:
        """Mark consecutive blocks as used now."""
        now = time.time_ns()
        for place, name in enumerate(names):
            try:
                os.utime(self._path(name), ns=(now - place * 1000, now - place * 1000))
            except FileNotFoundError:
                self._sizes.pop(name, None)

    def _path(self, name: str) -> Path:
        return self._own / (name + SUFFIX)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        for folder in (self._root, self._own):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _add(self, name: str, block: Block, size: int) -> None:
        half = self._path(name).with_suffix(_HALF)
        prefix_blocks.write(half, name, block)
        half.replace(self._path(name))
        self._sizes[name] = size
        self.nbytes += size

    def _has_room(self, size: int) -> bool:
        return self.nbytes + size <= self._limit()

    def _limit(self) -> int:
        """What the folder may hold now, as the disk's room goes."""
        return min(self._most_bytes, self.nbytes + shutil.disk_usage(self._root).free - ROOM_BYTES)

    def _trim(self, needed: int) -> None:
        """Delete files until `needed` more bytes fit. Under the lock: a half-written file is left over from a crash."""
        entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
        self.nbytes = sum(entry.size for entry in entries)
        most, oldest = max(0, self._limit() - needed), time.time_ns() - self._keep_ns
        kept = []
        for entry in entries:
            if self.nbytes > most or entry.used_ns < oldest:
                Path(entry.path).unlink(missing_ok=True)
                self.nbytes -= entry.size
            else:
                kept.append(entry)
        ours = ((Path(entry.path), entry.size) for entry in kept)
        self._sizes = {path.stem: size for path, size in ours if path.parent == self._own}

    def _entries(self) -> Iterator[_Entry]:
        for folder in self._root.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                try:
                    seen = path.stat()
                except FileNotFoundError:  # another found it broken
                    continue
                if path.suffix == SUFFIX:
                    yield _Entry(seen.st_mtime_ns, seen.st_size, str(path))
                elif path.suffix == _HALF:
                    path.unlink(missing_ok=True)


def fingerprint(folder: Path, layout: str, config: str = "config.json") -> str:
    """A hash of these weights, their quantisation, and the layout of what is stored of them on this device.

    Of each weight file it takes the size, the time of its last change and samples all over its content.
    """
    running = hashlib.sha256(f"{layout} {version('mlx')} {version('mlx-lm')} {prefix_blocks.BLOCK}".encode())
    running.update((folder / config).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            seen = os.fstat(file.fileno())
            running.update(f"{path.name} {seen.st_size} {seen.st_mtime_ns}".encode())
            for sample in range(_SAMPLES):
                file.seek(seen.st_size * sample // _SAMPLES)
                running.update(file.read(_SAMPLE_BYTES))
    return running.hexdigest()[:32]
