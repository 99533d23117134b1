"""The worker process: `python -m worker.app`; `worker.app:app` is the Celery app for Celery's own commands.

It starts in the order engine, a desk for each model (lease, publisher, loading), Celery: nothing is consumed before it
can be worked on. It stops the other way round: Celery stops consuming, the desks give running jobs `DRAIN_S`, their
publishers write what was said, what is left goes back to the queue, the leases are given up.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Final, NoReturn

from redis import RedisError

from shared.blas import Blas
from shared.garbage import settle
from shared.logging import configure
from shared.models.catalog import Catalog, CatalogModel, load_catalog
from shared.models.operations import Operations
from shared.models.registry import HostInfo, Registry
from shared.queue.claims import Reaper
from shared.queue.redis import connect
from shared.queue.wakeups import TicketOffice, app, make_app
from shared.settings import Settings, load_settings
from worker.engine.engine import Engine
from worker.model_worker import Desk, Place, named
from worker.models.load import first_line
from worker.models.switching import Switcher
from worker.process.critical import EXIT_BROKEN, depart, end_process, leave
from worker.process.watchdog import Sign, Signs, Watchdog
from worker.queue.claimer import register
from worker.queue.consumer import Consumer, WarmModel, node_name, stop_consuming
from worker.queue.control import take_orders
from worker.queue.lease import HostKeeper, Housekeeper
from worker.runner import choose_loader, memory_in_use, memory_limit
from worker.runner.base import Backend

logger = logging.getLogger("worker.app")

EXIT_CONFIG: Final = 78
"""Exit status when no model loads (EX_CONFIG): starting again would not help."""

LAST_WRITES_S: Final = 3.0
"""Beyond `DRAIN_S`, the time to write what was said, hand back and end; then the process is ended."""
LOAD_PATIENCE_S: Final = 600.0
"""Warming a large model up is one piece of work in which nothing else gets on."""
MOST_THREADS: Final = 512
"""Of Celery's pool, for the slots of all models that may be warm together; they are started as they are needed."""


class Service:
    """The parts of a worker process, and the order in which they start and stop."""

    def __init__(self, settings: Settings, index: int) -> None:
        self.catalog: Catalog = load_catalog(settings)
        self.memory_limit = 0
        self._settings = settings
        self._index = index
        self._node = node_name(settings, index)
        self._ending = False
        self._draining = False
        self._was_ready = False
        self._blas: Blas | None = None
        self._gflops = 0.0
        self._error_file = settings.run_dir / f"worker-{index}.error"
        self._desks: dict[str, Desk] = {}
        self._consumed: frozenset[str] = frozenset()

        client = connect(settings.store_url)
        self._registry = Registry(connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1))
        self._tickets = TicketOffice(make_app(settings, hasty=True), client, Registry(client))
        self._engine = Engine(self._die)
        self._watchdog = Watchdog(self._under_way, self._on_stuck, self._on_late, self._die)
        self._announcing = threading.Lock()
        self._host_keeper = HostKeeper(self.announce, settings.lease_s, self._die)
        self._switcher = Switcher(self, Operations(client), self._host_keeper.hurry)
        self._housekeeper = Housekeeper(Reaper(client, settings.max_attempts), self._tickets, self._die)
        self._place = Place(
            settings,
            index,
            self._node,
            time.time(),
            self._engine,
            self._tickets,
            lambda: self._watchdog.tripped or self._ending,
            lambda: frozenset(desk.id for desk in self.desks),
            self._die,
        )

    @property
    def desks(self) -> tuple[Desk, ...]:
        """Those of the models that are warm, or being loaded."""
        return tuple(self._desks.values())

    def run(self) -> int:
        """Work until a signal ends it; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for fault in self.catalog.faults:
            logger.error("the catalog: %s", fault)
        self._engine.start()
        self._watchdog.start()
        first, unknown = self.catalog.first(self._settings.worker_models, self._index)
        cold = [f"WORKER_MODELS: the catalog has no model {name}" for name in unknown]
        cold += self._warm_up(first)
        if not self._desks:
            return self._not_loaded("; ".join(cold))
        for reason in cold:
            logger.error(reason)
        settle()
        self._error_file.unlink(missing_ok=True)
        self._housekeeper.start()
        self._switcher.start()
        take_orders(self._switcher.put)
        register(app, self._work)
        consumer = Consumer(app, self._node, self._threads(), self._warm_models, self._on_ready)
        consumer.start()
        self._wind_up()
        return consumer.status

    def open_desk(self, model: CatalogModel, *, pinned: bool = False) -> Desk:
        """See `worker.models.switching.Models`."""
        desk = Desk(self._place, model, partial(self._load, model), pinned=pinned)
        self._desks[model.id] = desk
        desk.open()
        return desk

    def consume(self, desk: Desk) -> None:
        """See `worker.models.switching.Models`."""
        backend = desk.backend
        if backend is not None:
            logger.info("model loaded", extra={"model": backend.card.id, "about": backend.about})
        desk.warmed()
        self.divide_memory()
        self._consumed |= {desk.model.id}
        if self._was_ready:
            desk.ready()

    def make_room(self, coming: int) -> bool:
        """See `worker.models.switching.Models`."""
        self.divide_memory(coming)
        until = time.monotonic() + self._settings.drain_s
        while self.memory_used() + coming > self.memory_limit and time.monotonic() < until:
            time.sleep(0.05)
        return self.memory_used() + coming <= self.memory_limit

    def divide_memory(self, coming: int = 0) -> None:
        """What the models leave of the memory, and one that is coming, is for their caches, in equal parts."""
        self._engine.do(lambda: self._divide_now(coming))

    def close_desk(self, desk: Desk) -> None:
        """See `worker.models.switching.Models`."""
        self._consumed -= {desk.model.id}
        desk.drain(self._settings.drain_s)
        desk.wait_empty(self._settings.drain_s + LAST_WRITES_S)
        desk.shut()
        self._desks = {name: each for name, each in self._desks.items() if each is not desk}
        self.divide_memory()

    def memory_used(self) -> int:
        """See `worker.models.switching.Models`."""
        return memory_in_use()

    def _warm_up(self, models: Iterable[CatalogModel]) -> Iterator[str]:
        """Load these, as far as there is memory; why each of the others is not loaded."""
        for model in models:
            if self._desks and not self._switcher.fits(model, self.desks):
                yield f"{model.path} is not loaded: there is no memory for it beside the others"
                continue
            desk = self.open_desk(model)
            error = desk.batch.loaded.exception()
            if error is None:
                self.consume(desk)
                continue
            logger.debug("where it failed", exc_info=error)
            del self._desks[model.id]
            desk.settle()
            yield f"{model.path} does not load: {first_line(error)}"

    def _not_loaded(self, reason: str) -> int:
        """Say why, to the log and to whoever started us."""
        logger.error(reason)
        try:
            self._error_file.parent.mkdir(parents=True, exist_ok=True)
            self._error_file.write_text(reason + "\n")
        except OSError as unwritable:
            logger.warning("it is not written to %s: %s", self._error_file, unwritable)
        return EXIT_CONFIG

    def _load(self, model: CatalogModel, clock: Callable[[], float]) -> Generator[float, None, Backend]:
        """Load a model, on the engine's thread."""
        self._prepare_library()
        made = choose_loader(self._settings, model, clock)()
        backend = named((yield from made) if isinstance(made, Generator) else made, model)
        if self._blas is not None:
            backend.about |= {"blas": self._blas.version or self._blas.name, "gflops": round(self._gflops, 1)}
            if self._blas.reason:
                backend.about["blas_note"] = self._blas.reason
        return backend

    def _prepare_library(self) -> None:
        """Before anything imports MLX, and once."""
        if self.memory_limit:
            return
        if self._settings.backend != "fake":
            from shared.blas import prefer_openblas

            if self._settings.workers > 1:  # each takes its share of the cores, unless somebody has said otherwise
                share = max(1, (os.cpu_count() or 1) // self._settings.workers)
                os.environ.setdefault("OPENBLAS_NUM_THREADS", str(share))
            self._blas = prefer_openblas()
            from worker.models.blas_speed import measure_gflops

            self._gflops = measure_gflops()
        self.memory_limit = memory_limit(self._settings)

    def _divide_now(self, coming: int) -> None:
        batches = self._engine.batches
        left = self.memory_limit - sum(batch.backend.weights_bytes for batch in batches)
        for batch in batches if len(self.catalog.models) > 1 else ():
            alone = max(0, left) // len(batches)
            # The one that is coming may not stay, or not come: no job fails for want of what it would take.
            batch.grant(max(0, left - coming) // (len(batches) + 1) if coming else alone, alone)

    def _threads(self) -> int:
        """Of Celery's pool: as many as there are slots of the models that may be warm."""
        slots = (model.slots or self._settings.slots for model in self.catalog.models.values())
        return min(MOST_THREADS, sum(slots))

    def _warm_models(self) -> list[WarmModel]:
        """What the consumer takes tickets of."""
        return [WarmModel(desk.queues, desk.slots) for desk in self.desks if desk.model.id in self._consumed]

    def _work(self, model: str, ticket_for: str) -> None:
        """Do what a ticket says; one for a model that has just been unloaded is made up for by the rescue."""
        desk = self._desks.get(model)
        if desk is not None:
            desk.run(ticket_for)

    def _on_ready(self) -> None:
        """Celery consumes, also again after a reconnection: from now on this worker can be asked to switch models."""
        if not self._was_ready:
            self._was_ready = True
            for desk in self.desks:
                desk.ready()
            self._host_keeper.start()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """End: the first signal drains, a further one hands back at once."""
        first, self._draining = not self._draining, True
        if not self._was_ready:
            os._exit(os.EX_OK)  # no job is held yet, and the engine is deep inside the model library
        seconds = self._settings.drain_s if first else 0.0
        for desk in self.desks:
            desk.drain(seconds)
        self._watchdog.end_within(seconds + LAST_WRITES_S)
        stop_consuming()

    def _wind_up(self) -> None:
        """End the threads. Celery's have ended, so every job is settled."""
        self._switcher.close()
        self._housekeeper.stop()
        self._engine.close()
        self._engine.join()
        for desk in self.desks:
            desk.settle()
        self._host_keeper.stop()
        self._forget_host()
        logger.info("the worker has ended")

    def _under_way(self) -> Signs:
        if not self._was_ready:
            return {}
        patience_s = self._settings.watchdog_s
        engine_s = max(patience_s, LOAD_PATIENCE_S) if self._engine.loading else patience_s
        signs: dict[Hashable, Sign] = {}
        for desk in self.desks:
            signs |= desk.signs(patience_s, engine_s)
        return signs

    def _on_stuck(self, stuck: list[Hashable]) -> None:
        """End. A prompt that cannot be read fails its job, and no other is to blame; else, nobody knows."""
        read = [(desk, reading) for desk in self.desks if (reading := desk.read_now())]
        culprits = [(desk, reading[1]) for desk, reading in read if reading[0] in stuck]  # or read at last, this moment
        unread = any(isinstance(key, tuple) for key in stuck)
        what = ", ".join(sorted("reading of a prompt" if isinstance(key, tuple) else str(key) for key in stuck))
        self._end()
        end_process(
            f"its {what} has not got on for too long",
            *(partial(desk.fail, job) for desk, job in culprits),
            partial(self._give_up, None if unread else self._settings.max_attempts),
        )

    def _on_late(self) -> None:
        """End a drain that takes too long, as in the middle of a long step: what is left goes on elsewhere."""
        self._end()
        late = partial(logger.warning, "the drain's time is over: what still runs is left to others")
        depart(os.EX_OK, late, self._give_up)

    def _die(self, reason: str) -> NoReturn:
        """End because a thread has died."""
        self._end()
        end_process(reason, partial(self._give_up, self._settings.max_attempts))

    def _end(self) -> None:
        self._ending = self._draining = True
        for desk in self.desks:
            desk.refuse()

    def _give_up(self, max_attempts: int | None = None) -> None:
        for desk in self.desks:
            desk.give_up(max_attempts)
        self._forget_host()

    def _forget_host(self) -> None:
        """Nobody is to ask this process for a model any more."""
        with suppress(RedisError):  # it is soon forgotten anyway
            self._registry.forget_host(self._node)

    def announce(self) -> None:
        """See `worker.models.switching.Models`."""
        with self._announcing:  # or what one thread saw earlier is written later
            self._announce_now()

    def _announce_now(self) -> None:
        now = time.time()
        desks = self.desks
        self._registry.announce_host(
            HostInfo(
                node=self._node,
                host=socket.gethostname(),
                pid=os.getpid(),
                started_at=self._place.started_at,
                heartbeat_at=now,
                models=tuple(desk.model.id for desk in desks),
                memory_limit=self.memory_limit,
                memory_used=sum(desk.weights_bytes for desk in desks),
                memory_pinned=sum(desk.weights_bytes for desk in desks if desk.pinned),
                operations=self._switcher.in_hand,
            ),
            3 * self._settings.lease_s,
        )


def main() -> int:
    """Run one worker; the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is what its folder holds; nothing is fetched while it loads
    settings, index = load_settings(), int(os.environ.get("MLXQ_WORKER_INDEX", "0"))
    configure(f"worker-{index}", settings.log_level)
    try:
        return Service(settings, index).run()
    except BaseException:
        # Raised further it would end the interpreter, which MLX's threads do not survive in peace: they abort.
        logger.critical("the worker ends itself", exc_info=True)
        return EXIT_BROKEN


if __name__ == "__main__":
    leave(main())
