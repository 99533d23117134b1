"""The worker process: `python -m worker.app`.

It starts in the order engine, a model worker for each model (lease, publisher, loading), claimers, Celery: nothing is
claimed before it can be run, and no start depends on the broker. It stops the other way round: claimers claim no more,
running jobs get `DRAIN_S`, the publishers write what was generated, what is left goes back to the queue, the leases are
given up.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Generator, Hashable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Final, NoReturn

from redis import RedisError

from shared.blas import Blas
from shared.garbage import settle
from shared.jobs.store import Jobs
from shared.logging import configure
from shared.models.catalog import Catalog, CatalogModel, load_catalog
from shared.models.operations import Operations
from shared.models.registry import HostInfo, Registry
from shared.queue.claims import Reaper
from shared.queue.maintenance import Maintenance
from shared.queue.redis import connect
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier, app, make_app
from shared.settings import Settings, load_settings
from shared.tokenizing.client import Tokenizing
from worker.engine.core import EngineCore
from worker.engine.engine import EngineThread, Phase
from worker.model_worker import ModelWorker, WorkerProcess, named
from worker.models.load import first_line, never_exits
from worker.models.switching import Switcher
from worker.models.tokenizer_proof import HELPER
from worker.process.critical import end_process, exit_after, exit_now
from worker.process.death import report_leftovers
from worker.process.exits import EXIT_BROKEN, EXIT_CONFIG
from worker.process.identity import Identity, claim_identity, worker_index
from worker.process.parent import Launch, end_with_launcher
from worker.process.watchdog import Progress, ProgressByTask, Watchdog
from worker.queue.consumer import Consumer, stop_consuming
from worker.queue.control import take_orders
from worker.queue.lease import HostAnnouncer
from worker.runner import choose_loader, memory_in_use, memory_limit
from worker.runner.base import ModelRunner

logger = logging.getLogger("worker.app")

LAST_WRITES_S: Final = 3.0
"""Beyond `DRAIN_S`, the time to write what was generated, hand back and end; then the process is ended."""
SAME_SIGNAL_S: Final = 0.3
"""A signal this soon after the first is the same request: a process group and a launcher deliver it twice."""
LOAD_PATIENCE_S: Final = 600.0
"""Warming up a large model is one piece of work during which the engine makes no other progress."""


class Service:
    """The parts of a worker process, and the order in which they start and stop."""

    def __init__(self, settings: Settings, index: int, identity: Identity) -> None:
        self.catalog: Catalog = load_catalog(settings)
        self.memory_limit = 0
        self._settings = settings
        self._name = identity.name
        self._index = index
        self._breadcrumb = identity.breadcrumb
        self._signalled_at = 0.0
        self._ending = self._draining = self._was_ready = self._host_announced = False
        self._blas: Blas | None = None
        self._gflops = 0.0
        self._error_file = settings.run_dir / f"{identity.label}.error"
        self._workers: dict[str, ModelWorker] = {}

        client, sender = connect(settings.store_url), make_app(settings, hasty=True)
        notifier = Notifier(sender)
        self._registry = Registry(connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1))
        self._events = TaskEvents(sender, self._name)
        self._engine = EngineThread(self._die, self._on_phase)
        self._watchdog = Watchdog(self._under_way, self._on_stuck, self._on_late, self._die)
        self._announcing = threading.Lock()
        self._host_announcer = HostAnnouncer(self.announce, settings.lease_s, self._die)
        self._switcher = Switcher(self, Operations(client), self._host_announcer.hurry)
        reaper = Reaper(client, settings.max_attempts, settings.failed_request_bytes)
        self._maintenance = Maintenance(reaper, notifier, Jobs(client, settings))
        self._process = WorkerProcess(
            settings=settings,
            name=self._name,
            started_at=time.monotonic(),
            engine=self._engine,
            notifier=notifier,
            events=self._events,
            given_up=lambda: self._watchdog.tripped or self._ending,
            workers=lambda: frozenset(worker.id for worker in self.workers),
            on_death=self._die,
            trace=self._breadcrumb.step,
            tokenizing=Tokenizing(settings.template_timeout_s, HELPER),
        )

    @property
    def workers(self) -> tuple[ModelWorker, ...]:
        """Those of the models that are warm, or being loaded."""
        return tuple(self._workers.values())

    def run(self) -> int:
        """Work until a signal ends it; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for fault in self.catalog.faults:
            logger.error("catalog_entry_refused", extra={"reason": str(fault)})
        self._engine.start()
        self._watchdog.start()
        first, unknown = self.catalog.first(self._settings.worker_models, self._index)
        cold = [f"WORKER_MODELS: the catalog has no model {name}" for name in unknown]
        cold += self._warm_up(first)
        if not self._workers:
            return self._not_loaded("; ".join(cold))
        for reason in cold:
            logger.error("model_not_loaded", extra={"reason": reason})
        settle()
        self._error_file.unlink(missing_ok=True)
        self._maintenance.start()
        self._events.start()
        self._switcher.start()
        take_orders(self._switcher.put)
        consumer = Consumer(app, self._name, self._on_wakeup, self._on_connected)
        self._begin()
        consumer.start()
        self._wind_up()
        return consumer.status

    def open_worker(self, model: CatalogModel, *, pinned: bool = False) -> ModelWorker:
        """See `worker.models.switching.Models`."""
        worker = ModelWorker(self._process, model, partial(self._load, model), pinned=pinned)
        self._workers[model.id] = worker
        self._breadcrumb.workers({each.id: each.model.id for each in self.workers})
        worker.open()
        return worker

    def consume(self, worker: ModelWorker) -> None:
        """See `worker.models.switching.Models`."""
        runner = worker.runner
        if runner is not None:
            logger.info("model_loaded", extra={"model": runner.card.id, "about": runner.about})
        worker.warmed()
        self.divide_memory()
        if self._was_ready:
            worker.ready()

    def make_room(self, coming: int) -> bool:
        """See `worker.models.switching.Models`."""
        self.divide_memory(coming)
        until = time.monotonic() + self._settings.drain_s
        while self.memory_used() + coming > self.memory_limit and time.monotonic() < until:
            time.sleep(0.05)
        return self.memory_used() + coming <= self.memory_limit

    def divide_memory(self, coming: int = 0) -> None:
        """Divide what the models, and one that is coming, leave of the memory equally among their caches."""
        self._engine.do(lambda: self._divide_now(coming))

    def close_worker(self, worker: ModelWorker) -> None:
        """See `worker.models.switching.Models`."""
        worker.drain(self._settings.drain_s)
        worker.wait_empty(self._settings.drain_s + LAST_WRITES_S)
        worker.shut()
        self._workers = {name: each for name, each in self._workers.items() if each is not worker}
        self.divide_memory()

    def memory_used(self) -> int:
        """See `worker.models.switching.Models`."""
        return memory_in_use()

    def announce(self) -> None:
        """See `worker.models.switching.Models`."""
        with self._announcing:  # or what one thread saw earlier is written later
            self._announce_now()

    def _warm_up(self, models: Iterable[CatalogModel]) -> Iterator[str]:
        """Load these, as far as there is memory; yields why a model was not loaded."""
        for model in models:
            if self._workers and not self._switcher.fits(model, self.workers):
                yield f"{model.path} is not loaded: MEMORY_LIMIT_BYTES leaves no room beside the other models"
                continue
            worker = self.open_worker(model)
            error = worker.core.loaded.exception()
            if error is None:
                self.consume(worker)
                continue
            logger.debug("loading_failed", exc_info=error)
            del self._workers[model.id]
            worker.settle()
            yield f"{model.path} does not load: {first_line(error)}"

    def _not_loaded(self, reason: str) -> int:
        """Report why, in the log and in a file for `scripts/serve`."""
        logger.error("model_not_loaded", extra={"reason": reason})
        try:
            self._error_file.parent.mkdir(parents=True, exist_ok=True)
            self._error_file.write_text(reason + "\n")
        except OSError as unwritable:
            logger.warning("error_file_not_written", extra={"path": str(self._error_file), "reason": str(unwritable)})
        return EXIT_CONFIG

    def _load(self, model: CatalogModel) -> Generator[float, None, ModelRunner]:
        """Load a model, on the engine's thread."""
        self._prepare_library()
        runner = named((yield from never_exits(choose_loader(self._settings, model), model.path)), model)
        if self._blas is not None:
            runner.about |= {"blas": self._blas.version or self._blas.name, "gflops": round(self._gflops, 1)}
            if self._blas.reason:
                runner.about["blas_note"] = self._blas.reason
        return runner

    def _prepare_library(self) -> None:
        """Before anything imports MLX, and once."""
        if self.memory_limit:
            return
        if self._settings.backend != "fake":
            from shared.blas import prefer_openblas

            if self._settings.workers > 1:  # each takes its share of the cores, unless the environment says otherwise
                share = max(1, (os.cpu_count() or 1) // self._settings.workers)
                os.environ.setdefault("OPENBLAS_NUM_THREADS", str(share))
            self._blas = prefer_openblas()
            from worker.models.load import measure_gflops

            self._gflops = measure_gflops()
        self.memory_limit = memory_limit(self._settings)

    def _divide_now(self, coming: int) -> None:
        cores = self._engine.cores
        left = self.memory_limit - sum(core.runner.weights_bytes for core in cores)
        for core in cores if len(self.catalog.models) > 1 else ():
            alone = max(0, left) // len(cores)
            # The one that is coming may not stay, or not come: no job fails for want of what it would take.
            core.grant(max(0, left - coming) // (len(cores) + 1) if coming else alone, alone)

    def _on_phase(self, phase: Phase, core: EngineCore | None) -> None:
        """The engine's thread turns to another model, or to another kind of work."""
        worker = next((each for each in self.workers if each.core is core), None)
        if phase == "load" and worker is not None:
            self._breadcrumb.loading(worker.model.id)
        elif phase == "step" and worker is not None:
            self._breadcrumb.resume(worker.id)
        else:
            self._breadcrumb.idle()

    def _on_wakeup(self, model: str) -> None:
        worker = self._workers.get(model)
        if worker is not None:
            worker.wake()

    def _begin(self) -> None:
        """Claim jobs from now on, also while the broker is away: only wake-ups come through it."""
        self._was_ready = True
        for worker in self.workers:
            worker.ready()

    def _on_connected(self) -> None:
        """Celery is connected, perhaps again: from now on this process can be asked to switch models."""
        for worker in self.workers:
            worker.wake()  # wake-ups that were sent before have not come
        if not self._host_announced:
            self._host_announced = True
            self._host_announcer.start()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """End: the first signal drains, a later one hands back at once."""
        first, self._draining = not self._draining, True
        if not first and time.monotonic() < self._signalled_at + SAME_SIGNAL_S:
            return
        self._signalled_at = time.monotonic()
        if not self._was_ready:
            self._breadcrumb.remove()
            os._exit(os.EX_OK)  # no job is held yet, and the engine is deep inside the model library
        seconds = self._settings.drain_s if first else 0.0
        for worker in self.workers:
            worker.drain(seconds)
        self._watchdog.end_within(seconds + LAST_WRITES_S)
        stop_consuming()

    def _wind_up(self) -> None:
        """Wait until every job is settled, then end the threads. The watchdog bounds the time for it."""
        self._switcher.close()
        self._maintenance.stop()
        while not all(worker.wait_empty(1.0) for worker in self.workers):
            pass
        self._engine.close()
        self._engine.join()
        for worker in self.workers:
            worker.settle()
        self._host_announcer.stop()
        self._forget_host()
        self._events.stop()
        logger.info("worker_ended")

    def _under_way(self) -> ProgressByTask:
        if not self._was_ready:
            return {}
        patience_s = self._settings.watchdog_s
        engine_s = max(patience_s, LOAD_PATIENCE_S) if self._engine.loading else patience_s
        tasks: dict[Hashable, Progress] = {}
        for worker in self.workers:
            tasks |= worker.tasks(patience_s, engine_s)
        return tasks

    def _on_stuck(self, stuck: list[Hashable]) -> None:
        """End: something makes no progress."""
        self._die(f"no progress for too long: {', '.join(sorted(map(str, stuck)))}")

    def _on_late(self) -> None:
        """End a drain that takes too long, as in a long step: the jobs that still run continue elsewhere."""
        self._end()
        late = partial(logger.warning, "drain_timed_out")
        exit_after(os.EX_OK, late, self._give_up, self._breadcrumb.remove)

    def _die(self, reason: str) -> NoReturn:
        """End because this process cannot continue. The launcher, or the reaper, finds out which job is to blame."""
        self._end()
        end_process(reason)

    def _end(self) -> None:
        self._ending = self._draining = True
        for worker in self.workers:
            worker.refuse()

    def _give_up(self) -> None:
        for worker in self.workers:
            worker.give_up()
        self._forget_host()

    def _forget_host(self) -> None:
        """This process must not be asked for a model any more."""
        with suppress(RedisError):  # its card soon expires anyway
            self._registry.forget_host(self._name)

    def _announce_now(self) -> None:
        workers = self.workers
        self._registry.announce_host(
            HostInfo(
                node=self._name,
                host=socket.gethostname(),
                pid=os.getpid(),
                started_at=self._process.started_at,
                heartbeat_at=time.monotonic(),
                models=tuple(worker.model.id for worker in workers),
                memory_limit=self.memory_limit,
                memory_used=sum(worker.weights_bytes for worker in workers),
                memory_pinned=sum(worker.weights_bytes for worker in workers if worker.pinned),
                operations=self._switcher.in_hand,
            ),
            3 * self._settings.lease_s,
        )


def main() -> int:
    """Run one worker; the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is what its folder holds; nothing is fetched while it loads
    launch = Launch.present()
    end_with_launcher(launch)
    settings, index = load_settings(), worker_index()
    configure("worker", settings.log_level)
    try:
        identity = claim_identity(settings, index, launch.token)
        configure(identity.name, settings.log_level)
        report_leftovers(settings, identity.label)
        status = Service(settings, index or 0, identity).run()
        identity.breadcrumb.remove()
        return status
    except BaseException:
        # Raised further it would end the interpreter, which MLX's threads do not survive in peace: they abort.
        logger.critical("worker_ends", exc_info=True)
        return EXIT_BROKEN


if __name__ == "__main__":
    exit_now(main())
