"""The thread that touches the model libraries, and which of its models it steps next.

Models take turns by the time they have used (start-time fair queueing): each step of a model adds its duration to the
model's account, and the model with the least goes next. A model that had nothing to do starts where the others are, so
idling earns nothing. A model that is being loaded takes turns too, a piece of the weights at a time, so that the others
decode meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal, TypeAlias

from worker.engine.core import EngineCore
from worker.process.critical import CriticalThread, OnDeath, end_process
from worker.runner import release

IDLE_S = 1.0
"""Longest sleep: then the gauges are due."""

Work: TypeAlias = Callable[[], object]
Phase: TypeAlias = Literal["idle", "load", "step"]
OnPhase: TypeAlias = Callable[[Phase, EngineCore | None], object]


class EngineThread(CriticalThread):
    """Steps engine cores. All methods but those of the thread itself may be called from any thread.

    Args:
        on_phase: called before the thread does something else than before, and after work between two steps: "load" or
            "step" with the core that it works for, "idle" with None.
    """

    def __init__(self, on_death: OnDeath = end_process, on_phase: OnPhase = lambda _phase, _core: None) -> None:
        super().__init__("engine", on_death)
        self._on_phase = on_phase
        self._phase: tuple[Phase, EngineCore | None] | None = ("idle", None)
        self._queue: SimpleQueue[Work | None] = SimpleQueue()  # its put is safe in a signal handler
        self._cores: tuple[EngineCore, ...] = ()
        self._loading: dict[EngineCore, Iterator[None]] = {}
        self._active: set[EngineCore] = set()
        self._reached_s = 0.0
        self._open = True

    @property
    def cores(self) -> tuple[EngineCore, ...]:
        """Those it steps."""
        return self._cores

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded: its last piece, warming up, may take long."""
        return bool(self._loading)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._loading and all(core.idle for core in self._cores)

    def wake(self) -> None:
        """Look for work."""
        self._queue.put(None)

    def open(self, core: EngineCore) -> None:
        """Load a model, then step it; `core.loaded` has the result."""
        self.do(lambda: self._loading.setdefault(core, core.loading()))

    def shut(self, core: EngineCore, then: Callable[[], object]) -> None:
        """Unload a model; `then` is called when its memory is free."""

        def closed() -> None:
            self._cores = tuple(each for each in self._cores if each is not core)
            self._active.discard(core)
            core.close()
            release()
            then()

        self.do(closed)

    def do(self, work: Work) -> None:
        """Have something done between two steps."""
        self._queue.put(work)

    def close(self) -> None:
        """End the thread after its current step. What it holds is handed back: drain first."""

        def ended() -> None:
            self._open = False

        self.do(ended)

    def work(self) -> None:
        """Step as long as there is work, and sleep while there is none."""
        while self._open:
            if self.idle:
                self._sleep()
            self.turn()
        for core in self._cores:
            core.close()

    def turn(self) -> None:
        """Run the queued work, load a piece of each model that is being loaded, and step one model."""
        while not self._queue.empty():
            if (work := self._queue.get()) is not None:
                self._work(work)
        for core, pieces in [*self._loading.items()]:
            self._load_piece(core, pieces)
        due = self._next()
        if due is not None:
            due.spent_s += self._timed("step", due, due.step)
        for core in self._cores:  # of the others, too: what they report of the process's memory changes meanwhile
            core.read_gauges()

    def _work(self, work: Work) -> None:
        work()
        self._phase = None  # it may have changed the batch of another model than the one that is stepped

    def _timed(self, phase: Phase, core: EngineCore, work: Work) -> float:
        """Work for a model; the seconds that takes, in which the own time of the others stands still."""
        self._enter(phase, core)
        started = time.perf_counter()
        work()
        took_s = time.perf_counter() - started
        for other in (*self._cores, *self._loading):
            if other is not core:
                other.own_time.away_s += took_s
        return took_s

    def _enter(self, phase: Phase, core: EngineCore | None) -> None:
        if (phase, core) != self._phase:
            self._phase = (phase, core)
            self._on_phase(phase, core)

    def _load_piece(self, core: EngineCore, pieces: Iterator[None]) -> None:
        self._timed("load", core, lambda: next(pieces, None))
        if not core.loaded.done():
            return
        del self._loading[core]
        if core.loaded.exception() is None:
            self._cores = (*self._cores, core)

    def _next(self) -> EngineCore | None:
        """The core with something to do that has used the least time."""
        if len(self._cores) == 1:  # a model that comes later starts where this one is
            only = self._cores[0]
            self._reached_s = max(self._reached_s, only.spent_s)
            return only
        due = [core for core in self._cores if not core.idle]
        for core in due:
            if core not in self._active:
                core.spent_s = max(core.spent_s, self._reached_s)
        self._active = set(due)
        if not due:
            return None
        core = min(due, key=lambda each: each.spent_s)
        self._reached_s = core.spent_s
        return core

    def _sleep(self) -> None:
        """Until there is something to do, or gauges are due."""
        self._enter("idle", None)
        due_s = min((core.read_gauges() for core in self._cores), default=IDLE_S)
        with suppress(Empty):
            if (work := self._queue.get(timeout=due_s)) is not None:
                self._work(work)
