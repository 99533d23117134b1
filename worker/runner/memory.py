"""How much memory there is for the caches of rows, and what a row needs of it.

Where memory ends, MLX does not always say so: on a CPU a failed allocation ends the process, and so may a GPU's. So
rows are counted before they are taken in, at the length that they may grow to.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from worker.runner import kv_cache as kv
from worker.runner.base import Fit, OutOfMemory

SHARE_OF_GPU = 0.9
SHARE_OF_MACHINE = 0.8
"""Of the memory that is free; the rest is for what a step needs beside the caches, and for others."""
SHARE_OF_PREFIXES = 0.25
"""Most that prefixes may take of the memory that rows leave, unless somebody says otherwise."""

COLUMNS = 256
"""Caches grow by so many tokens."""

_V2 = ("memory.max", "memory.current")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_SAYS_SO = re.compile(r"malloc|unable to allocate|out of memory|insufficient memory|memory allocation", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the model library says with this that an allocation failed."""
    if isinstance(error, RuntimeError):
        return bool(_SAYS_SO.search(str(error)))
    return isinstance(error, MemoryError | OutOfMemory)


@contextmanager
def exhaustion_told() -> Iterator[None]:
    """Raise `OutOfMemory` where the library raises what it has for that."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from error


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes there are for the caches of rows and prefixes together, and the most that prefixes may take of them."""

    most_bytes: int
    prefix_bytes: int


UNLIMITED = Memory(sys.maxsize, 0)
"""Without prefixes."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of a row's cache.

    Attributes:
        fixed: bytes whatever its length.
        growing: of each layer that grows the bytes a token, and how many tokens it holds at most.
    """

    fixed: int
    growing: tuple[tuple[int, int | None], ...]

    @classmethod
    def of(cls, model: Any) -> Footprint:
        """Measured on one token."""
        layers = kv.empty(model, 1)
        kv.feed(model, layers, [(0,)])
        parts = kv.flat(layers)
        keyed = [part for part in parts if getattr(part, "keys", None) is not None]
        return cls(
            fixed=sum(part.nbytes for part in parts if not hasattr(part, "keys")),
            growing=tuple((part.nbytes // part.keys.shape[2], getattr(part, "max_size", None)) for part in keyed),
        )

    def bytes(self, tokens: int) -> int:
        """What a row takes when the longest of its batch has so many tokens."""
        columns = -(-tokens // COLUMNS) * COLUMNS
        # A sliding window holds the chunk that is read beside its own tokens.
        return self.fixed + sum(each * min(columns, most + COLUMNS if most else columns) for each, most in self.growing)

    def filled(self, tokens: int) -> int:
        """What of it a step reads when a row has so many tokens."""
        return self.fixed + sum(each * min(tokens, most or tokens) for each, most in self.growing)


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory for caches.

    Attributes:
        hoped_bytes: what there may be again before long, where that is more: a row that would fit then waits for it.
    """

    most_bytes: int
    footprint: Footprint
    hoped_bytes: int = 0

    @property
    def widest_bytes(self) -> int:
        """What nothing may pass, however long it waits."""
        return max(self.most_bytes, self.hoped_bytes)

    def needed(self, lengths: Sequence[int]) -> int:
        """What a batch of rows that may grow to these lengths takes: in it all are padded to the longest."""
        return len(lengths) * self.footprint.bytes(max(lengths, default=0))

    def fits(self, length: int, others: Sequence[int], passing: int = 0) -> Fit:
        """Whether there is memory for one more row.

        Args:
            passing: bytes that are taken beside all rows for a while. A row that is alone has not grown by then.
        """
        if self.needed([length]) > self.widest_bytes:
            return Fit.NEVER
        needed = self.needed([length, *others]) + (passing if others else 0)
        return Fit.NOW if needed <= self.most_bytes else Fit.LATER


def device_limit(workers: int) -> int:
    """Bytes that MLX should take on this device, the model included, when so many processes share it."""
    device = mx.device_info()
    if (working_set := device.get("max_recommended_working_set_size")) is not None:  # Metal
        return int(SHARE_OF_GPU * int(working_set) / workers)
    ours = mx.get_active_memory()
    if (free := device.get("free_memory")) is not None:  # CUDA
        return int(SHARE_OF_GPU * (ours + int(free)) / workers)
    return ours + int(SHARE_OF_MACHINE * available_memory() / workers)


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or what its control group leaves it."""
    return min([_free_of_machine(), *_free_of_groups()])


def _free_of_machine() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_of_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group around this process leaves it, in both versions of the interface."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    places = [(root, path, _V2) for _, controllers, path in lines if not controllers]
    places += [(root / "memory", path, _V1) for _, controllers, path in lines if controllers == "memory"]
    found = []
    for top, path, names in places:
        inner = top / path.lstrip("/")
        # In a container the path may be the host's; what holds for us is at the top then.
        around = {top, inner, *(group for group in inner.parents if group.is_relative_to(top))}
        found += [free for group in around if (free := _free_of_group(group, *names)) is not None]
    return found


def _free_of_group(group: Path, limit: str, usage: str) -> int | None:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        idle = re.search(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    # Files that were read and are not in use count as used, and are given up first.
    return None if most == "max" else max(0, int(most) - used + (int(idle[1]) if idle else 0))
