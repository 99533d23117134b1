"""CPU time and memory of a contender's processes, descendants included."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import psutil

_SAMPLE_S: Final = 0.25
_DESCENDANTS_S: Final = 2.0
"""Looking for descendants reads every process of the machine, so it is done less often."""

_IDLE_S: Final = 1.0
_IDLE_SHARE: Final = 0.1
"""Share of a core that idle processes may use for this many seconds. The idle stack uses 2 %."""
_SETTLE_WITHIN_S: Final = 60.0


class Meter:
    """Measures a process and its descendants while the `with` block runs.

    Attributes:
        cpu_s: user and system time, including that of descendants that ended meanwhile.
        peak_mb: the largest sum of resident memory, in MB; shared memory counts for each process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._family: list[psutil.Process] = []
        self._searched_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="meter", daemon=True)
        self.cpu_s = 0.0
        self.peak_mb = 0.0

    def __enter__(self) -> Self:
        self._find_family()
        self.cpu_s = -self._cpu()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._find_family()
        self._update_peak()
        self.cpu_s += self._cpu()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            if time.monotonic() - self._searched_at > _DESCENDANTS_S:
                self._find_family()
            self._update_peak()

    def _find_family(self) -> None:
        self._searched_at = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            self._family = [self._root, *self._root.children(recursive=True)]

    def _update_peak(self) -> None:
        self.peak_mb = max(self.peak_mb, sum(map(_resident_mb, self._family)))

    def _cpu(self) -> float:
        # The time of a child that has ended is part of its parent's, once the parent has waited for it.
        return sum(sum(_times(process)) for process in self._family)


def cpu_s(process: psutil.Process) -> float:
    """User and system time of a process and its descendants so far, in seconds."""
    family = [process]
    with suppress(psutil.Error):
        family += process.children(recursive=True)
    return sum(sum(_times(each)[:2]) for each in family)


def settle(pid: int) -> None:
    """Wait until a process and its descendants are idle, but not longer than `_SETTLE_WITHIN_S`.

    A server that reports that it is ready may still be starting programs and checking files for some seconds.
    """
    process, until = psutil.Process(pid), time.monotonic() + _SETTLE_WITHIN_S
    before = cpu_s(process)
    while time.monotonic() < until:
        time.sleep(_IDLE_S)  # the interval over which CPU time is measured
        after = cpu_s(process)
        if abs(after - before) < _IDLE_SHARE * _IDLE_S:  # less than before: a descendant has ended
            return
        before = after


def _times(process: psutil.Process) -> tuple[float, ...]:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return times.user, times.system, times.children_user, times.children_system
    return ()


def _resident_mb(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return float(process.memory_info().rss / 1e6)
    return 0.0
