"""One model of a worker process, with its own lease, claimer, engine and publisher.

To the queue each model worker is a separate worker, so a problem with one model does not affect the jobs of another.
The model workers of a process share its engine thread, Celery consumer and watchdog.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import psutil
from redis import RedisError

from shared.jobs.images import ImageStore
from shared.jobs.log import JobLog
from shared.models.catalog import CatalogModel
from shared.models.folder import INPUT_KINDS
from shared.models.registry import Registry, WorkerInfo, WorkerProtocol
from shared.queue.claims import Claims
from shared.queue.job_spans import JobSpans
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier
from shared.redis.client import connect
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from worker.engine.core import EngineCore, Trace
from worker.engine.engine import EngineThread
from worker.models.load import tokenizer_defaults
from worker.models.tokenizer_announcer import TokenizerAnnouncer
from worker.process.critical import OnDeath
from worker.process.watchdog import Progress
from worker.queue.claimer import Claimer
from worker.queue.lease import LeaseRenewer
from worker.queue.prepare import Preparer
from worker.queue.publisher import Publisher
from worker.runner.base import ModelRunner, RunnerLoader

logger = logging.getLogger(__name__)

PUBLISHER_S: Final = 60.0
"""Longest time of a write. While Redis is unreachable, several connections are tried."""
UNLOAD_S: Final = 600.0
"""Longest wait for the engine thread to unload a model. It may be in a long step."""
SLOTS_PER_RESERVED_ROW: Final = 16
"""By default, jobs of the class `batch` leave one row per this many slots free. Further rows are preempted when other
jobs need them, so the reserve need not be large. It costs a sixteenth of the rows while only batches run."""
RATE_WINDOW_S: Final = 60.0
"""Period over which tokens per second are averaged."""


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """What the model workers of one process share.

    Attributes:
        name: of the process (`worker.process.identity`).
        started_at: monotonic moment.
        let_leases_lapse: returns whether leases must not be renewed, because the process cannot continue.
        worker_ids: returns the ids of all its model workers.
        trace: records the jobs in a model worker's batch, in case the process dies.
        tokenizing: the process's tokenizer helpers.
    """

    settings: Settings
    name: str
    started_at: float
    engine: EngineThread
    notifier: Notifier
    events: TaskEvents
    spans: JobSpans
    let_leases_lapse: Callable[[], bool]
    worker_ids: Callable[[], frozenset[str]]
    on_death: OnDeath
    trace: Callable[[str, list[str]], object]
    tokenizing: Tokenizing


class ModelWorker:
    """The lease, claimer, engine core and publisher of one model.

    Attributes:
        id: identifies its lease, claims and card; new for each loading.
        pinned: whether the model must not be unloaded to make room for another.
        state: `loading`, `ready` or `draining`.
    """

    def __init__(
        self,
        process: WorkerProcess,
        model: CatalogModel,
        load: RunnerLoader,
        *,
        pinned: bool = False,
    ) -> None:
        settings = process.settings
        self.model = model
        self.pinned = pinned or model.pin
        self.slots = model.slots or settings.slots
        self.state = "loading"
        # Leases need a new id for each loading, also after a restart: the old lease lapses, and its writes are fenced.
        self.id = f"{process.name}/{secrets.token_hex(4)}"
        self._process = process
        self._opened_at = time.monotonic()
        self._load_s = 0.0
        self._announced = False
        self._tokenizer = TokenizerAnnouncer(settings, self._announce_again)
        self._rate = Rate()
        self._psutil = psutil.Process()

        client = connect(settings.store_url)
        # A renewal, with one retry and the pause before it, must not take longer than the lease.
        quick_client = connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1)
        files = connect(settings.store_url, decode_responses=False)
        self._clients = (client, quick_client, files)
        self._lease_claims = Claims(quick_client, self.id)
        self._registry = Registry(quick_client)
        claims = Claims(client, self.id)
        self._publisher = Publisher(
            claims,
            lambda *write_result: self.core.apply_write_result(*write_result),  # noqa: PLW0108 - the core is made later
            process.on_death,
            process.events.started,
        )
        trace: Trace = partial(process.trace, self.id)
        reserve = self.slots // SLOTS_PER_RESERVED_ROW if settings.reserved_rows is None else settings.reserved_rows
        self._reserve = reserve
        self.core = EngineCore(load, self.slots, self._publisher.put, process.engine.wake, trace, reserve)
        preparer = Preparer(process.tokenizing, lambda: self._tokenizer.sources, ImageStore(files).get, JobLog(client))
        self._claimer = self._make_claimer(claims, preparer)
        self._lease = self._make_lease()

    def _make_claimer(self, claims: Claims, preparer: Preparer) -> Claimer:
        process = self._process
        return Claimer(
            self.model.id,
            self.core,
            claims,
            preparer,
            self._publisher.put,
            process.notifier,
            process.events,
            process.spans,
            self.slots,
            process.worker_ids,
            process.on_death,
        )

    def _make_lease(self) -> LeaseRenewer:
        process = self._process
        return LeaseRenewer(
            self._lease_claims,
            self.core.apply_write_result,
            lambda: self._claimer.held,
            self._announce,
            process.settings.lease_s,
            process.let_leases_lapse,
            process.on_death,
        )

    @property
    def runner(self) -> ModelRunner | None:
        """The loaded model; None while no model is loaded."""
        loaded = self.core.loaded
        return loaded.result() if loaded.done() and loaded.exception() is None else None

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's weights; 0 while no model is loaded."""
        runner = self.runner
        return runner.weights_bytes if runner else 0

    def open(self) -> None:
        """Start the lease and the publisher, and load the model."""
        self._lease.start()
        self._publisher.start()
        self._process.engine.load(self.core)

    def on_loaded(self) -> None:
        """Prove the tokenizer of the loaded model, and announce it."""
        self._load_s = time.monotonic() - self._opened_at
        runner = self.runner
        if runner is not None and runner.card.kind in INPUT_KINDS:
            self._tokenizer.begin_file(self.model.path)
        elif runner is not None and not self._process.settings.modelless:
            defaults = tokenizer_defaults(self.model.path) if runner.card.kind == "text" else None
            self._tokenizer.begin(self.model.path, runner.card, defaults)

    @property
    def unused_s(self) -> float:
        """Seconds since this model last had a job; 0 while it has one, is loading or is draining."""
        core = self.core
        if self.state != "ready" or core.busy or not core.idle or not self._claimer.idle:
            return 0.0
        return time.monotonic() - max(core.used_at, core.progress_at)

    def start_claiming(self) -> None:
        """Claim jobs from now on."""
        if self.state == "loading":
            self.state = "ready"
            self._lease.hurry()
            self._claimer.start()

    def wake(self) -> None:
        """Look for jobs now."""
        self._claimer.wake()

    def erase_prefixes(self, cutoffs: Mapping[str, float]) -> None:
        """Drop the cached prefixes of API keys that were not used after a time, by key."""
        self.core.erase_prefixes(cutoffs)

    def stop_claiming(self) -> None:
        """Claim no more jobs, because the process ends."""
        self._claimer.draining = True

    def drain(self, seconds: float) -> None:
        """Claim no more jobs; hand back those that still run after `seconds`. Safe in a signal handler."""
        self._claimer.draining = True
        self.state = "draining"
        self.core.drain(seconds)

    def wait_idle(self, seconds: float) -> bool:
        """Wait up to `seconds` until no job is held; return whether that is so."""
        until = time.monotonic() + seconds
        while not self._claimer.idle and time.monotonic() < until:
            time.sleep(0.02)
        return self._claimer.idle

    def unload(self) -> None:
        """Unload the model and close this worker. Rows that are still in the batch are handed back."""
        unloaded = threading.Event()
        if self.core in self._process.engine.cores:
            self._process.engine.unload(self.core, unloaded.set)
            if not unloaded.wait(UNLOAD_S):
                self._process.on_death(f"{self.model.id} was not unloaded within {UNLOAD_S:.0f} s")
        self.close()

    def close(self) -> None:
        """End the threads and the lease. The engine must not step this model any more, so every job is settled."""
        self._tokenizer.close()
        self._publisher.close()
        if self._publisher.is_alive():
            self._publisher.join()
        self._claimer.stop()
        self._lease.stop()
        self.end_lease()
        for client in self._clients:
            client.close()

    def end_lease(self) -> None:
        """Return the jobs that this worker holds to the queue now, instead of when its lease lapses."""
        try:
            self._process.notifier.wake(self._lease_claims.retire())
        except RedisError as error:
            logger.warning("lease_not_ended", extra={"reason": str(error)})

    def progress(self, limit_s: float, engine_limit_s: float) -> dict[Hashable, Progress]:
        """Return the progress of this worker's tasks, for the watchdog.

        Args:
            limit_s: longest time without progress.
            engine_limit_s: the same for the engine.
        """
        tasks: dict[Hashable, Progress] = {}
        if self.state == "loading" or not self.core.idle:
            tasks[f"engine of {self.model.id}"] = Progress(self.core.progress_at, engine_limit_s)
        if self._publisher.backlog:
            tasks[f"publisher of {self.model.id}"] = Progress(self._publisher.attempts, max(limit_s, PUBLISHER_S))
        return tasks

    def _announce_again(self) -> None:
        """Announce the model's card again, because it has changed."""
        self._announced = False
        self._lease.hurry()

    def _announce(self, lease_unknown: bool) -> None:
        """Announce this worker's state; also its model's card, if Redis does not know that."""
        self._registry.announce_worker(self._describe(), 3 * self._process.settings.lease_s)
        runner = self.runner
        if runner is not None and self.state != "loading" and (lease_unknown or not self._announced):
            self._announced = True  # set before the card is read, so that a change meanwhile is announced again
            if self._registry.announce_model(self._tokenizer.card(runner.card)):
                self._tokenizer.upload()

    def _describe(self) -> WorkerInfo:
        runner, core = self.runner, self.core
        totals = core.totals
        stats = {
            "steps": totals.steps,
            "batch_rows_total": totals.rows,
            "generated_tokens": totals.tokens,
            "prompt_tokens": totals.prompt_tokens,
            "batch_size": totals.last_batch,
            "claims_total": self._claimer.claimed,
            "attempts_started_total": self._publisher.started,
            "claimed_jobs": len(self._claimer.held),
            "publisher_backlog": self._publisher.backlog,
            "engine_idle_s": time.monotonic() - core.progress_at if core.busy else 0.0,
            "model_bytes": self.weights_bytes,
            "load_s": self._load_s,
            "load_progress": core.load_progress,
            "tokens_per_s": self._rate.update(totals.tokens),
            "pinned": float(self.pinned),
            "resident_memory_bytes": self._psutil.memory_info().rss,
            "threads": self._psutil.num_threads(),
            "open_files": self._psutil.num_fds(),
            "reserved_rows": self._reserve,
            "unused_s": self.unused_s,
        }
        return WorkerInfo(
            id=self.id,
            node=self._process.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=self.model.id,
            state=self.state,
            slots=self.slots,
            slots_used=core.slots_used,
            started_at=self._process.started_at,
            heartbeat_at=time.monotonic(),
            stats=stats | totals.gauges,
            about=dict(runner.about) if runner else {},
            protocol=max(WorkerProtocol),
            histograms=(*totals.latencies.read(), self._publisher.latency),
        )


def with_catalog_values(runner: ModelRunner, model: CatalogModel) -> ModelRunner:
    """Give a runner the catalog's model id and, where the catalog sets one, its context length."""
    card = runner.card
    runner.card = replace(card, id=model.id, context=model.context or card.context)
    return runner


class Rate:
    """The growth per second of a counter over the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque()

    def update(self, count: float) -> float:
        """Record the counter; return its growth per second over `RATE_WINDOW_S`."""
        now = self._clock()
        self._samples.append((now, count))
        while len(self._samples) > 2 and self._samples[1][0] <= now - RATE_WINDOW_S:
            self._samples.popleft()
        began, first = self._samples[0]
        return (count - first) / (now - began) if now > began else 0.0
