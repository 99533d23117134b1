"""The worker process: `python -m worker.app`.

It starts in this order: engine, model workers (lease, publisher, loading), claimers, Celery. So a job is claimed only
when it can run, and the start does not depend on the broker. It stops in reverse: claimers claim no more, running jobs
get `DRAIN_S`, publishers write the last output, the remaining jobs return to the queue, and the leases end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Hashable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Final, NoReturn

from pydantic import ValidationError
from redis import RedisError

from shared.jobs.store import Jobs
from shared.load_settings import faults, load_settings
from shared.logging import configure
from shared.models.additions import CatalogAdditions, CatalogUpdates
from shared.models.catalog import Catalog, load_catalog
from shared.models.operations import Operations
from shared.models.registry import HostInfo, Registry
from shared.queue.job_spans import JobSpans
from shared.queue.maintenance import Maintenance
from shared.queue.recovery import Reaper
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier, app, make_app
from shared.redis.client import connect
from shared.redis.durability import why_unproven
from shared.redis.requirements import Fault, find_faults
from shared.runtime import freeze_garbage_collector
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from shared.tracing import make_tracer
from worker.engine.engine import EngineThread
from worker.models.tokenizer_proof import HELPER
from worker.process.critical import end_process, exit_after, exit_now
from worker.process.death import report_leftovers
from worker.process.exits import EXIT_BROKEN, EXIT_CONFIG
from worker.process.identity import Identity, claim_identity, worker_index
from worker.process.parent import Launch, end_with_launcher
from worker.process.watchdog import Progress, ProgressByTask, Watchdog
from worker.queue.consumer import Consumer, stop_consuming
from worker.queue.lease import HostAnnouncer
from worker.service.control import set_handlers
from worker.service.downloads import Downloads
from worker.service.model_worker import WorkerProcess
from worker.service.pool import LAST_WRITES_S, ModelPool
from worker.service.prefix_eraser import PrefixEraser
from worker.service.switching import Switcher

logger = logging.getLogger("worker.app")

SAME_SIGNAL_S: Final = 1.0
"""A signal this soon after the first is the same request: a process group and a launcher deliver it twice. On a busy
machine a launcher took more than 0.3 s to pass it on."""
LOADING_LIMIT_S: Final = 600.0
"""Longest time without progress of the engine while it loads a model. Warming up a large one is a single step."""


class Service:
    """The parts of a worker process, and the order in which they start and stop.

    Args:
        index: of this worker among those of its supervisor; selects its entry in WORKER_MODELS.
    """

    def __init__(self, settings: Settings, index: int, identity: Identity) -> None:
        self._settings = settings
        self._index = index
        self._name = identity.name
        self._breadcrumb = identity.breadcrumb
        self._error_file = settings.run_dir / f"{identity.label}.error"
        self._started_at = time.monotonic()
        self._signalled_at = 0.0
        self._ending = self._draining = self._host_announced = False
        self._announcing = threading.Lock()

        client, sender = connect(settings.store_url), make_app(settings, hasty=True)
        notifier = Notifier(sender)
        self._registry = Registry(connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1))
        self._events = TaskEvents(sender, self._name)
        self._tracer = make_tracer(settings, "mlxq-worker", self._name)
        self._engine = EngineThread(self._die, lambda *phase: self._models.on_phase(*phase))  # noqa: PLW0108 - the pool is made later
        self._watchdog = Watchdog(self._tasks, self._on_stuck, self._on_overdue, self._die)
        self._host_announcer = HostAnnouncer(self._announce, settings.lease_s, self._die)
        reaper = Reaper(client, settings.max_attempts, settings.failed_request_bytes, settings.keep_requests)
        self._maintenance = Maintenance(reaper, notifier, Jobs(client, settings))
        self._catalog: Catalog = load_catalog(settings)
        self._models = ModelPool(settings, self._catalog, self._shared_parts(notifier), self._breadcrumb)
        additions, operations, hurry = CatalogAdditions(client), Operations(client), self._host_announcer.hurry
        updates = CatalogUpdates(settings, self._catalog, additions)
        self._switcher = Switcher(self._models, operations, self._announce, hurry, updates.refresh)
        self._downloads = Downloads(settings.models_dir, operations, additions, hurry)
        self._prefix_eraser = PrefixEraser(client, settings.prefixes_dir, lambda: self._models.workers, self._die)

    def _shared_parts(self, notifier: Notifier) -> WorkerProcess:
        return WorkerProcess(
            settings=self._settings,
            name=self._name,
            started_at=self._started_at,
            engine=self._engine,
            notifier=notifier,
            events=self._events,
            spans=JobSpans(self._tracer, self._name),
            let_leases_lapse=lambda: self._watchdog.tripped or self._ending,
            worker_ids=lambda: frozenset(worker.id for worker in self._models.workers),
            on_death=self._die,
            trace=self._breadcrumb.step,
            tokenizing=Tokenizing(
                self._settings.template_timeout_s,
                HELPER,
                special_tokens_in_text=self._settings.special_tokens_in_text,
            ),
        )

    def run(self) -> int:
        """Work until a signal ends the process; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for fault in self._catalog.faults:
            logger.error("catalog_entry_refused", extra={"reason": str(fault)})
        if denied := self._check_redis():
            return self._cannot_start("redis_unsuitable", denied)
        self._engine.start()
        self._watchdog.start()
        self._prefix_eraser.round()  # before any model reads the files
        not_loaded = self._load_models()
        if not self._models.workers:
            return self._cannot_start("model_not_loaded", "; ".join(not_loaded))
        for reason in not_loaded:
            logger.error("model_not_loaded", extra={"reason": reason})
        freeze_garbage_collector()
        self._error_file.unlink(missing_ok=True)
        self._maintenance.start()
        self._prefix_eraser.start()
        self._events.start()
        self._switcher.start()
        self._downloads.start()
        set_handlers(self._switcher.put, self._downloads)
        consumer = Consumer(app, self._name, self._models.wake, self._on_connected)
        self._models.start_serving()
        consumer.start()
        self._shut_down()
        return consumer.status

    def _load_models(self) -> list[str]:
        """Load the models of WORKER_MODELS; return the reasons why some were not loaded."""
        models, unknown = self._catalog.first(self._settings.worker_models, self._index)
        missing = [f"WORKER_MODELS: the catalog has no model {name}" for name in unknown]
        return [*missing, *self._models.load_all(models)]

    def _check_redis(self) -> str:
        """Log what makes Redis unsuitable. Return why no job can run; an empty string also if Redis is unreachable."""
        faults: list[Fault] = []
        with suppress(RedisError), connect(self._settings.store_url, timeout_s=2, retries=0) as client:
            faults = find_faults(client, broker=not self._settings.broker_url, process="worker")
            if self._settings.durable and not faults and (reason := why_unproven(client)):
                faults.append(Fault(reason, fatal=False))
        for fault in faults:
            if not fault.fatal:
                logger.error("redis_unsuitable", extra={"reason": fault.text})
        return " ".join(fault.text for fault in faults if fault.fatal)

    def _cannot_start(self, event: str, reason: str) -> int:
        """Report why this process ends, in the log and in a file for `scripts/serve`."""
        logger.error(event, extra={"reason": reason})
        try:
            self._error_file.parent.mkdir(parents=True, exist_ok=True)
            self._error_file.write_text(reason + "\n")
        except OSError as error:
            logger.warning("error_file_not_written", extra={"path": str(self._error_file), "reason": str(error)})
        return EXIT_CONFIG

    def _on_connected(self) -> None:
        """Handle a new connection of Celery. From the first one on, clients may ask this process to switch models."""
        for worker in self._models.workers:
            worker.wake()  # wake-ups that were sent earlier were lost
        if not self._host_announced:
            self._host_announced = True
            self._host_announcer.start()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Begin to end the process. The first signal drains, a later one hands all jobs back at once."""
        first, self._draining = not self._draining, True
        if not first and time.monotonic() < self._signalled_at + SAME_SIGNAL_S:
            return
        self._signalled_at = time.monotonic()
        if not self._models.serving:
            self._breadcrumb.remove()
            os._exit(os.EX_OK)  # no job is held yet, and the engine thread may be busy in the model library
        seconds = self._settings.drain_s if first else 0.0
        for worker in self._models.workers:
            worker.drain(seconds)
        self._watchdog.end_within(seconds + LAST_WRITES_S)
        stop_consuming()

    def _shut_down(self) -> None:
        """Wait until every job is settled, then end the threads. The watchdog bounds the time for this."""
        self._switcher.close()
        self._downloads.close()
        self._maintenance.stop()
        self._prefix_eraser.stop()
        while not all(worker.wait_idle(1.0) for worker in self._models.workers):
            pass
        self._engine.close()
        self._engine.join()
        for worker in self._models.workers:
            worker.close()
        self._host_announcer.stop()
        self._forget_host()
        self._events.stop()
        self._send_traces()
        logger.info("worker_ended")

    def _send_traces(self) -> None:
        """Send the last spans, because the process ends."""
        if self._tracer is not None:
            self._tracer.close()

    def _tasks(self) -> ProgressByTask:
        """Return the tasks that the watchdog watches."""
        if not self._models.serving:
            return {}
        limit_s = self._settings.watchdog_s
        engine_limit_s = max(limit_s, LOADING_LIMIT_S) if self._engine.loading else limit_s
        tasks: dict[Hashable, Progress] = {}
        for worker in self._models.workers:
            tasks |= worker.progress(limit_s, engine_limit_s)
        return tasks

    def _on_stuck(self, stuck: list[Hashable]) -> None:
        self._die(f"no progress for too long: {', '.join(sorted(map(str, stuck)))}")

    def _on_overdue(self) -> None:
        """End a drain that takes too long, such as in a long step. Jobs that still run continue elsewhere."""
        self._stop_claiming()
        log = partial(logger.warning, "drain_timed_out")
        exit_after(os.EX_OK, log, self._end_leases, self._breadcrumb.remove, self._send_traces)

    def _die(self, reason: str) -> NoReturn:
        """End because this process cannot continue. The launcher or the reaper finds the job to blame."""
        self._stop_claiming()
        end_process(reason)

    def _stop_claiming(self) -> None:
        self._ending = self._draining = True
        for worker in self._models.workers:
            worker.stop_claiming()

    def _end_leases(self) -> None:
        for worker in self._models.workers:
            worker.end_lease()
        self._forget_host()

    def _forget_host(self) -> None:
        """Delete this process's card, so that no client asks it to load a model."""
        with suppress(RedisError):  # the card expires soon anyway
            self._registry.forget_host(self._name)

    def _announce(self) -> None:
        """Write this process's card. Called by several threads: the lock keeps an older card from replacing a newer."""
        with self._announcing:
            self._registry.announce_host(self._describe_host(), 3 * self._settings.lease_s)

    def _describe_host(self) -> HostInfo:
        workers = self._models.workers
        return HostInfo(
            node=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=self._started_at,
            heartbeat_at=time.monotonic(),
            models=tuple(worker.model.id for worker in workers),
            memory_limit=self._models.memory_limit,
            memory_used=sum(worker.weights_bytes for worker in workers),
            memory_pinned=sum(worker.weights_bytes for worker in workers if worker.pinned),
            operations=(*self._switcher.operations, *self._downloads.operations),
        )


def main() -> int:
    """Run one worker; return the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is loaded from its folder alone, never downloaded
    launch = Launch.current()
    end_with_launcher(launch)
    try:
        settings = load_settings()
    except ValidationError as error:
        print(faults(error), file=sys.stderr)
        return EXIT_CONFIG
    index = worker_index()
    configure("worker", settings.log_level)
    try:
        identity = claim_identity(settings, index, launch.token)
        configure(identity.name, settings.log_level)
        report_leftovers(settings, identity.label)
        status = Service(settings, index or 0, identity).run()
        identity.breadcrumb.remove()
        return status
    except BaseException:
        # An exception that ends the interpreter would run destructors, and MLX's threads abort in them.
        logger.critical("worker_ends", exc_info=True)
        return EXIT_BROKEN


if __name__ == "__main__":
    exit_now(main())
