"""All that a worker process has for one of its models: a lease, the claimer, the engine, the publisher.

To the queue each is a worker of its own, with its own lease: what happens to one model's jobs does not depend on
another's. They share the process's engine thread, its Celery consumer and its watchdog.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from redis import RedisError

from shared.jobs.images import ImageStore
from shared.jobs.log import JobLog
from shared.models.catalog import CatalogModel
from shared.models.registry import Registry, WorkerInfo
from shared.queue.claims import Claims
from shared.queue.redis import connect
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier
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
"""Longest time of a write: while Redis is out of reach, several connections are tried."""
UNLOAD_S: Final = 600.0
"""Longest wait for the engine thread to let a model go: it may be in the middle of a long step."""
RATE_WINDOW_S: Final = 60.0
"""Period over which tokens per second are averaged."""


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """What the model workers of one process share.

    Attributes:
        name: of the process (`worker.process.identity`).
        given_up: whether leases are to lapse, because the process cannot continue.
        workers: ids of all its model workers.
        trace: notes which jobs of a model worker are in its batch, for the case that the process dies.
        tokenizing: the process's tokenizer helpers.
    """

    settings: Settings
    name: str
    started_at: float
    engine: EngineThread
    notifier: Notifier
    events: TaskEvents
    given_up: Callable[[], bool]
    workers: Callable[[], frozenset[str]]
    on_death: OnDeath
    trace: Callable[[str, list[str]], object]
    tokenizing: Tokenizing


class ModelWorker:
    """One model's part of a worker process."""

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

        client = connect(settings.store_url)
        # A renewal must not take longer than the lease holds, tried twice and with the pause between.
        quick_client = connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1)
        files = connect(settings.store_url, decode_responses=False)
        self._clients = (client, quick_client, files)
        self._lease_claims = Claims(quick_client, self.id)
        self._registry = Registry(quick_client)
        claims = Claims(client, self.id)
        self._publisher = Publisher(
            claims,
            lambda *write_result: self.core.apply_write_result(*write_result),  # noqa: PLW0108 - the core is made after it
            process.on_death,
            process.events.started,
        )
        trace: Trace = partial(process.trace, self.id)
        self.core = EngineCore(load, self.slots, self._publisher.put, process.engine.wake, trace)
        preparer = Preparer(process.tokenizing, lambda: self._tokenizer.sources, ImageStore(files).get, JobLog(client))
        self._claimer = Claimer(
            model.id,
            self.core,
            claims,
            preparer,
            self._publisher.put,
            process.notifier,
            process.events,
            self.slots,
            process.workers,
            process.on_death,
        )
        self._keeper = LeaseRenewer(
            self._lease_claims,
            self.core.apply_write_result,
            lambda: self._claimer.held,
            self._announce,
            settings.lease_s,
            process.given_up,
            process.on_death,
        )

    @property
    def runner(self) -> ModelRunner | None:
        """The warm model; None before and after."""
        loaded = self.core.loaded
        return loaded.result() if loaded.done() and loaded.exception() is None else None

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's weights; 0 before and after."""
        runner = self.runner
        return runner.weights_bytes if runner else 0

    def open(self) -> None:
        """Begin: the lease, then the loading."""
        self._keeper.start()
        self._publisher.start()
        self._process.engine.open(self.core)

    def warmed(self) -> None:
        """The model is loaded: prove its tokenizer, and announce it."""
        self._load_s = time.monotonic() - self._opened_at
        runner = self.runner
        if runner is not None and self._process.settings.backend != "fake":
            defaults = tokenizer_defaults(self.model.path) if runner.card.kind == "text" else None
            self._tokenizer.begin(self.model.path, runner.card, defaults)

    def ready(self) -> None:
        """Jobs are claimed from now on."""
        if self.state == "loading":
            self.state = "ready"
            self._keeper.hurry()
            self._claimer.start()

    def wake(self) -> None:
        """A wake-up for this model came."""
        self._claimer.wake()

    def refuse(self) -> None:
        """Claim no more jobs: the process ends."""
        self._claimer.draining = True

    def drain(self, seconds: float) -> None:
        """Claim no more jobs, give running ones `seconds` to end, then hand them back. Safe in a signal handler."""
        self._claimer.draining = True
        self.state = "draining"
        self.core.drain(seconds)

    def wait_empty(self, seconds: float) -> bool:
        """Wait until no job is held, for `seconds` at most; whether none is."""
        until = time.monotonic() + seconds
        while not self._claimer.idle and time.monotonic() < until:
            time.sleep(0.02)
        return self._claimer.idle

    def shut(self) -> None:
        """Unload the model; rows that it still has are handed back."""
        gone = threading.Event()
        if self.core in self._process.engine.cores:
            self._process.engine.shut(self.core, gone.set)
            if not gone.wait(UNLOAD_S):
                self._process.on_death(f"{self.model.id} was not unloaded within {UNLOAD_S:.0f} s")
        self.settle()

    def settle(self) -> None:
        """End the threads and the lease. Every job is settled, and the engine does not step this model any more."""
        self._tokenizer.close()
        self._publisher.close()
        if self._publisher.is_alive():
            self._publisher.join()
        self._claimer.stop()
        self._keeper.stop()
        self.give_up()
        for client in self._clients:
            client.close()

    def give_up(self) -> None:
        """Return what this worker holds to the queue now, instead of when its lease lapses."""
        try:
            self._process.notifier.wake(self._lease_claims.retire())
        except RedisError as error:
            logger.warning("lease_not_given_up", extra={"reason": str(error)})

    def tasks(self, patience_s: float, engine_s: float) -> dict[Hashable, Progress]:
        """The tasks under way here, for the watchdog: another model's progress is not this one's.

        Args:
            engine_s: how long the engine may make no progress.
        """
        tasks: dict[Hashable, Progress] = {}
        if self.state == "loading" or not self.core.idle:
            tasks[f"engine ({self.model.id})"] = Progress(self.core.progress_at, engine_s)
        if self._publisher.backlog:
            tasks[f"publisher of {self.model.id}"] = Progress(self._publisher.attempts, max(patience_s, PUBLISHER_S))
        return tasks

    def _announce_again(self) -> None:
        """The model's card has changed."""
        self._announced = False
        self._keeper.hurry()

    def _announce(self, unknown: bool) -> None:
        """Write who this worker is and what it does; and its model's card, when Redis does not know it."""
        self._registry.announce_worker(self._describe(), 3 * self._process.settings.lease_s)
        runner = self.runner
        if runner is not None and self.state != "loading" and (unknown or not self._announced):
            self._announced = True  # before the card is read: what changes it then says so again
            if self._registry.announce_model(self._tokenizer.card(runner.card)):
                self._tokenizer.upload()

    def _describe(self) -> WorkerInfo:
        runner, core = self.runner, self.core
        totals = core.totals
        stats = {
            "steps": totals.steps,
            "generated_tokens": totals.tokens,
            "prompt_tokens": totals.prompt_tokens,
            "batch_size": totals.last_batch,
            "claimed_jobs": len(self._claimer.held),
            "publisher_backlog": self._publisher.backlog,
            "engine_idle_s": time.monotonic() - core.progress_at if core.busy else 0.0,
            "model_bytes": self.weights_bytes,
            "load_s": self._load_s,
            "load_progress": core.load_progress,
            "tokens_per_s": self._rate.update(totals.tokens),
            "pinned": float(self.pinned),
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
        )


def named(runner: ModelRunner, model: CatalogModel) -> ModelRunner:
    """The runner under the catalog's name, with the context that the catalog sets."""
    card = runner.card
    runner.card = replace(card, id=model.id, context=model.context or card.context)
    return runner


class Rate:
    """How fast a counter has grown of late."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque()

    def update(self, count: float) -> float:
        """Note the counter; its growth per second over the last minute."""
        now = self._clock()
        self._samples.append((now, count))
        while len(self._samples) > 2 and self._samples[1][0] <= now - RATE_WINDOW_S:
            self._samples.popleft()
        began, first = self._samples[0]
        return (count - first) / (now - began) if now > began else 0.0
