"""What a contender takes of the machine: CPU time and memory of its processes, children included."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import psutil

_EVERY_S: Final = 0.25
_LOOK_AGAIN_S: Final = 2.0
"""Who the children are is asked less often: it takes a look at every process of the machine."""


class Meter:
    """Measures a process and all below it while the block runs.

    Attributes:
        cpu_s: user and system time spent, that of children which ended meanwhile included.
        peak_mb: the largest sum of their resident memory seen, in MB; what they share counts for each.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._family: list[psutil.Process] = []
        self._looked_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="meter", daemon=True)
        self.cpu_s = 0.0
        self.peak_mb = 0.0

    def __enter__(self) -> Self:
        self._look()
        self.cpu_s = -self._cpu()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self._weigh()
        self.cpu_s += self._cpu()

    def _sample(self) -> None:
        while not self._ended.wait(_EVERY_S):
            if time.monotonic() - self._looked_at > _LOOK_AGAIN_S:
                self._look()
            self._weigh()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            self._family = [self._root, *self._root.children(recursive=True)]

    def _weigh(self) -> None:
        self.peak_mb = max(self.peak_mb, sum(map(_resident_mb, self._family)))

    def _cpu(self) -> float:
        # A child that has ended lives on in its parent's count, where its parent has waited for it.
        return sum(sum(_times(process)) for process in self._family)


def cpu_s(process: psutil.Process) -> float:
    """User and system time that a process and all below it have used so far, in seconds."""
    family = [process]
    with suppress(psutil.Error):
        family += process.children(recursive=True)
    return sum(sum(_times(each)[:2]) for each in family)


def _times(process: psutil.Process) -> tuple[float, ...]:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return times.user, times.system, times.children_user, times.children_system
    return ()


def _resident_mb(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return float(process.memory_info().rss / 1e6)
    return 0.0
