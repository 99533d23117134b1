"""The engine thread: the only one that touches the model libraries. It chooses which model to step next.

Models take turns by the time that they have used (start-time fair queueing). Each step adds its duration to the
model's account, and the model with the smallest account goes next. A model that was idle starts at the present virtual
time, so idling earns no credit. A model that is being loaded takes turns as well, one piece of the weights at a time,
so that the others keep decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, Literal, TypeAlias

from worker.engine.core import EngineCore
from worker.process.critical import CriticalThread, OnDeath, end_process
from worker.runner import release

IDLE_S: Final = 1.0
"""Longest sleep of a thread without models; with models, it wakes to read their gauges."""

Work: TypeAlias = Callable[[], object]
Phase: TypeAlias = Literal["idle", "load", "step"]
OnPhase: TypeAlias = Callable[[Phase, EngineCore | None], object]


class EngineThread(CriticalThread):
    """Steps engine cores.

    Any thread may call `wake`, `load`, `unload`, `call_soon` and `close`, and read the properties.

    Args:
        on_phase: called before the thread begins something else, and after work between two steps: "load" or "step"
            with the core, "idle" with None.
    """

    def __init__(self, on_death: OnDeath = end_process, on_phase: OnPhase = lambda _phase, _core: None) -> None:
        super().__init__("engine", on_death)
        self._on_phase = on_phase
        self._phase: tuple[Phase, EngineCore | None] | None = ("idle", None)
        self._queue: SimpleQueue[Work | None] = SimpleQueue()  # its put is safe in a signal handler
        self._cores: tuple[EngineCore, ...] = ()
        self._loading: dict[EngineCore, Iterator[None]] = {}
        self._active: set[EngineCore] = set()
        self._virtual_time_s = 0.0
        self._open = True

    @property
    def cores(self) -> tuple[EngineCore, ...]:
        """The cores of the loaded models."""
        return self._cores

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded. Its last piece, the warm-up, may take long."""
        return bool(self._loading)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._loading and all(core.idle for core in self._cores)

    def wake(self) -> None:
        """Wake the thread because a core has a message."""
        self._queue.put(None)

    def load(self, core: EngineCore) -> None:
        """Load a model, then step it. `core.loaded` gets the result."""
        self.call_soon(lambda: self._loading.setdefault(core, core.loading()))

    def unload(self, core: EngineCore, on_unloaded: Callable[[], object]) -> None:
        """Unload a model; `on_unloaded` is called when its memory is free."""

        def unload_now() -> None:
            self._cores = tuple(each for each in self._cores if each is not core)
            self._active.discard(core)
            core.close()
            release()
            on_unloaded()

        self.call_soon(unload_now)

    def call_soon(self, work: Work) -> None:
        """Call `work` on the engine thread, between two steps."""
        self._queue.put(work)

    def close(self) -> None:
        """End the thread after its current step, and hand all rows back. Drain first to avoid that."""

        def end() -> None:
            self._open = False

        self.call_soon(end)

    def work(self) -> None:
        """Step while there is work, and sleep while there is none."""
        while self._open:
            if self.idle:
                self._sleep()
            self.turn()
        for core in self._cores:
            core.close()

    def turn(self) -> None:
        """Do the queued work, load a piece of each model that is being loaded, and step one model."""
        while not self._queue.empty():
            if (work := self._queue.get()) is not None:
                self._do(work)
        for core, pieces in [*self._loading.items()]:
            self._load_piece(core, pieces)
        due = self._next()
        if due is not None:
            due.charged_s += self._timed("step", due, due.step)
        for core in self._cores:  # the gauges of the other models include the memory of the whole process
            core.read_gauges()

    def _do(self, work: Work) -> None:
        work()
        self._phase = None  # the work may have changed the batch of any model, so the next phase is always reported

    def _timed(self, phase: Phase, core: EngineCore, work: Work) -> float:
        """Do work for one model and return its duration, during which the clocks of the other models stand still."""
        self._enter_phase(phase, core)
        started = time.perf_counter()
        work()
        duration_s = time.perf_counter() - started
        for other in (*self._cores, *self._loading):
            if other is not core:
                other.clock.paused_s += duration_s
        return duration_s

    def _enter_phase(self, phase: Phase, core: EngineCore | None) -> None:
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
        """Return the core with work that has used the least time."""
        if len(self._cores) == 1:  # keep the virtual time current for models that are loaded later
            only = self._cores[0]
            self._virtual_time_s = max(self._virtual_time_s, only.charged_s)
            return only
        due = [core for core in self._cores if not core.idle]
        for core in due:
            if core not in self._active:
                core.charged_s = max(core.charged_s, self._virtual_time_s)
        self._active = set(due)
        if not due:
            return None
        core = min(due, key=lambda each: each.charged_s)
        self._virtual_time_s = core.charged_s
        return core

    def _sleep(self) -> None:
        """Sleep until there is work or gauges are due."""
        self._enter_phase("idle", None)
        due_s = min((core.read_gauges() for core in self._cores), default=IDLE_S)
        with suppress(Empty):
            if (work := self._queue.get(timeout=due_s)) is not None:
                self._do(work)
