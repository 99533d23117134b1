"""The thread that touches the model libraries, and which of its models it steps next.

Models take turns by the time they have taken (start-time fair queueing): each step of a model adds what it took to the
model's account, and the one with the least goes next. A model that had nothing to do begins where the others are, so
idling earns nothing. A model that is being loaded takes its turns too, a piece of the weights at a time, so that the
others decode meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue

from worker.engine.core import Batch
from worker.process.critical import OnDeath, VitalThread, end_process
from worker.runner import release

logger = logging.getLogger(__name__)

IDLE_S = 1.0
"""Longest sleep: then the gauges are due."""

Order = Callable[[], object]


class Engine(VitalThread):
    """Steps batches. All methods but those of the thread itself may be called from any thread."""

    def __init__(self, on_death: OnDeath = end_process) -> None:
        super().__init__("engine", on_death)
        self._orders: SimpleQueue[Order | None] = SimpleQueue()  # its put is safe in a signal handler
        self._batches: tuple[Batch, ...] = ()
        self._loading: dict[Batch, Iterator[None]] = {}
        self._active: set[Batch] = set()
        self._reached_s = 0.0
        self._open = True

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Those it steps."""
        return self._batches

    @property
    def loading(self) -> bool:
        """Whether a model is on its way: its last piece, warming up, may take long."""
        return bool(self._loading)

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of it."""
        return not self._loading and all(batch.idle for batch in self._batches)

    def wake(self) -> None:
        """There is something to do."""
        self._orders.put(None)

    def open(self, batch: Batch) -> None:
        """Load a model, then step it; `batch.loaded` tells how that went."""
        self._order(lambda: self._loading.setdefault(batch, batch.loading()))

    def shut(self, batch: Batch, then: Callable[[], object]) -> None:
        """Let go of a model; `then` is called when that is done, and its memory is free."""

        def closed() -> None:
            self._batches = tuple(each for each in self._batches if each is not batch)
            self._active.discard(batch)
            batch.close()
            release()
            then()

        self._order(closed)

    def do(self, work: Order) -> None:
        """Have something done between two steps."""
        self._order(work)

    def close(self) -> None:
        """End the thread after its current step. What it holds stays unsettled: drain first."""

        def ended() -> None:
            self._open = False

        self._order(ended)

    def _order(self, order: Order) -> None:
        self._orders.put(order)

    def work(self) -> None:
        """Step for as long as there is work, and sleep while there is none."""
        while self._open:
            if self.idle:
                self._sleep()
            self.turn()
        for batch in self._batches:
            batch.close()

    def turn(self) -> None:
        """Hear what was asked; a piece of each load; a step of whoever's turn it is."""
        while not self._orders.empty():
            if (order := self._orders.get()) is not None:
                order()
        for batch, pieces in [*self._loading.items()]:
            self._load_on(batch, pieces)
        due = self._next()
        if due is not None:
            due.spent_s += self._spent_on(due, due.step)
        for batch in self._batches:  # of the others, too: what they tell of the process's memory changes meanwhile
            batch.read_gauges()

    def _spent_on(self, batch: Batch, work: Order) -> float:
        """Do something for a model; the seconds that takes, in which the time of the others stands still."""
        started = time.perf_counter()
        work()
        took_s = time.perf_counter() - started
        for other in (*self._batches, *self._loading):
            if other is not batch:
                other.own_time.away_s += took_s
        return took_s

    def _load_on(self, batch: Batch, pieces: Iterator[None]) -> None:
        self._spent_on(batch, lambda: next(pieces, None))
        if not batch.loaded.done():
            return
        del self._loading[batch]
        if batch.loaded.exception() is None:
            self._batches = (*self._batches, batch)

    def _next(self) -> Batch | None:
        """The batch that has had the least, of those with something to do."""
        if len(self._batches) == 1:  # nobody to be fair to, but whoever comes later begins where this one is
            only = self._batches[0]
            self._reached_s = max(self._reached_s, only.spent_s)
            return only
        due = [batch for batch in self._batches if not batch.idle]
        for batch in due:
            if batch not in self._active:
                batch.spent_s = max(batch.spent_s, self._reached_s)
        self._active = set(due)
        if not due:
            return None
        batch = min(due, key=lambda each: each.spent_s)
        self._reached_s = batch.spent_s
        return batch

    def _sleep(self) -> None:
        """Until something is asked, or gauges are due."""
        due_s = min((batch.read_gauges() for batch in self._batches), default=IDLE_S)
        with suppress(Empty):
            if (order := self._orders.get(timeout=due_s)) is not None:
                order()
