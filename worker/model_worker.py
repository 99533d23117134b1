"""All that a worker process has for one of its models: a lease and claims, the batch, the publisher, the task's work.

To the queue each is a worker of its own, with its own lease: what becomes of one model's jobs does not depend on
another's. They share the process's engine, its Celery consumer and its watchdog.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from kombu import Queue
from kombu.exceptions import OperationalError
from redis import RedisError

from shared.jobs.images import ImageStore
from shared.jobs.log import JobLog
from shared.jobs.record import Job
from shared.models.catalog import CatalogModel
from shared.models.registry import Registry, WorkerInfo
from shared.queue.claims import Claims
from shared.queue.redis import connect
from shared.queue.wakeups import TicketOffice, own_queue, queue_name
from shared.settings import Settings
from worker.engine.core import Batch, OwnTime
from worker.engine.engine import Engine
from worker.process.critical import OnDeath
from worker.process.watchdog import Sign
from worker.queue.claimer import Runner
from worker.queue.lease import Claim, LeaseKeeper
from worker.queue.publisher import Publisher
from worker.runner.base import Backend

logger = logging.getLogger(__name__)

PUBLISHER_S: Final = 60.0
"""A write may take so long: while Redis is out of reach, several connections are tried."""
LATELY_S: Final = 60.0
"""Tokens a second are told over so long."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a desk is: what its worker process is and shares.

    Attributes:
        index: of the process on this machine.
        node: its Celery node name.
        given_up: whether leases are to lapse, because the process cannot go on.
        workers: the ids of all its desks.
    """

    settings: Settings
    index: int
    node: str
    started_at: float
    engine: Engine
    tickets: TicketOffice
    given_up: Callable[[], bool]
    workers: Callable[[], frozenset[str]]
    on_death: OnDeath


class Desk:
    """One model's part of a worker process."""

    def __init__(
        self,
        place: Place,
        model: CatalogModel,
        load: Callable[[Callable[[], float]], Backend | Generator[float, None, Backend]],
        *,
        pinned: bool = False,
    ) -> None:
        settings = place.settings
        own_time = OwnTime()
        self.model = model
        self.pinned = pinned or model.pin
        self.slots = model.slots or settings.slots
        self.state = "loading"
        # A restarted worker is another worker: the old one's lease lapses, and that counts the loss.
        self.id = f"{socket.gethostname()}-{place.index}-{secrets.token_hex(4)}"
        self._place = place
        self._opened_at = time.monotonic()
        self._load_s = 0.0
        self._announced = False
        self._tokenizer: str | None = None
        self._rate = Rate()
        self._held: set[Claim] = set()

        client = connect(settings.store_url)
        claims = Claims(client, self.id)
        self._publisher = Publisher(claims, lambda *word: self.batch.heed(*word), place.on_death)  # noqa: PLW0108
        self.batch = Batch(
            partial(load, own_time), self.slots, self._publisher.put, place.engine.wake, own_time=own_time
        )
        # The lease keeper's calls must not take longer than the lease holds, tried twice and with the pause between.
        quick_client = connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1)
        self._quick_claims = Claims(quick_client, self.id)
        self._registry = Registry(quick_client)
        self._keeper = LeaseKeeper(
            self._quick_claims,
            self.batch.heed,
            self._held,
            self._announce,
            settings.lease_s,
            settings.max_attempts,
            place.given_up,
            place.on_death,
        )
        files = connect(settings.store_url, decode_responses=False)
        self._clients = (client, quick_client, files)
        self._runner = Runner(
            self.batch,
            self._publisher,
            claims,
            JobLog(client),
            place.tickets,
            self._held,
            self._keeper.wait_renewal,
            ImageStore(files).get,
            self.slots,
            lambda: place.workers() - {self.id},
        )

    @property
    def queues(self) -> tuple[str, Queue]:
        """The Celery queues of this model: of all its workers, and this one's own."""
        return queue_name(self.model.id), own_queue(self.model.id, self._place.node)

    @property
    def backend(self) -> Backend | None:
        """The warm model; None before and after."""
        loaded = self.batch.loaded
        return loaded.result() if loaded.done() and loaded.exception() is None else None

    @property
    def weights_bytes(self) -> int:
        """What the model takes; 0 before and after."""
        backend = self.backend
        return backend.weights_bytes if backend else 0

    def open(self) -> None:
        """Begin: the lease, then the loading."""
        self._keeper.start()
        self._publisher.start()
        self._place.engine.open(self.batch)

    def ready(self) -> None:
        """Jobs are taken from now on."""
        if self.state == "loading":
            self.state = "ready"
            self._keeper.hurry()

    def run(self, ticket_for: str) -> None:
        """Do what a ticket says."""
        self._runner.run(self.model.id, ticket_for)

    def fail(self, job: Job) -> None:
        """End a job of this model that cannot be read."""
        self._runner.fail(job)

    def refuse(self) -> None:
        """Take no more jobs: the process ends."""
        self._runner.draining = True

    def drain(self, seconds: float) -> None:
        """Take no more jobs, give those that run so long to end, then hand them back. Safe in a signal handler."""
        self._runner.draining = True
        self.state = "draining"
        self.batch.drain(seconds)

    def wait_empty(self, seconds: float) -> bool:
        """Wait until no job is held, nor about to be; whether that is so."""
        until = time.monotonic() + seconds
        while not self._runner.idle and time.monotonic() < until:
            time.sleep(0.02)
        return self._runner.idle

    def shut(self) -> None:
        """Let go of the model; rows that it still has are handed back."""
        gone = threading.Event()
        if self.batch in self._place.engine.batches:
            self._place.engine.shut(self.batch, gone.set)
            gone.wait()
        self.settle()

    def settle(self) -> None:
        """End the threads and the lease. Every job is settled, and the engine does not step this model any more."""
        self._publisher.close()
        if self._publisher.is_alive():
            self._publisher.join()
        self._keeper.stop()
        self.give_up()
        for client in self._clients:
            client.close()

    def give_up(self, max_attempts: int | None = None) -> None:
        """Let others have what we hold at once, instead of when the lease lapses."""
        try:
            self._place.tickets.send_all(self._quick_claims.retire(max_attempts=max_attempts))
        except (RedisError, OperationalError) as error:
            logger.warning("the lease is left to lapse: %s", error)

    def signs(self, patience_s: float, engine_s: float) -> dict[Hashable, Sign]:
        """What is under way here, for the watchdog: another model's progress is not this one's.

        Args:
            engine_s: how long the engine may gain nothing.
        """
        signs: dict[Hashable, Sign] = {}
        if self.state == "loading" or not self.batch.idle:
            signs[f"engine ({self.model.id})"] = Sign(self.batch.progress_at, engine_s)
        if encoding := self._runner.encoding:
            signs[encoding[0]] = Sign(0, patience_s)
        if self._publisher.backlog:
            signs[f"publisher of {self.model.id}"] = Sign(self._publisher.attempts, max(patience_s, PUBLISHER_S))
        return signs

    def read_now(self) -> tuple[Claim, Job] | None:
        """The job whose prompt is being read."""
        return self._runner.encoding

    def warmed(self) -> None:
        """The model is loaded. What is announced with it is read here, for the lease's thread must wait for no disk."""
        self._load_s = time.monotonic() - self._opened_at
        backend = self.backend
        if backend is not None and backend.card.tokenizer:
            self._tokenizer = (self.model.path / "tokenizer.json").read_text(encoding="utf-8")

    def _announce(self, unknown: bool) -> None:
        """Tell who we are; and which model we have, when Redis does not know."""
        self._registry.announce_worker(self._describe(), 3 * self._place.settings.lease_s)
        backend = self.backend
        if backend is not None and self.state != "loading" and (unknown or not self._announced):
            self._registry.announce_model(backend.card, self._tokenizer)
            self._announced = True

    def _describe(self) -> WorkerInfo:
        backend, batch = self.backend, self.batch
        totals = batch.totals
        stats = {
            "steps": totals.steps,
            "generated_tokens": totals.tokens,
            "prompt_tokens": totals.prompt_tokens,
            "batch_size": totals.last_batch,
            "row_cap": batch.row_cap,
            "publisher_backlog": self._publisher.backlog,
            "engine_idle_s": time.monotonic() - batch.progress_at if batch.busy else 0.0,
            "model_bytes": self.weights_bytes,
            "load_s": self._load_s,
            "load_progress": batch.load_progress,
            "tokens_per_s": self._rate.seen(totals.tokens),
            "pinned": float(self.pinned),
        }
        return WorkerInfo(
            id=self.id,
            node=self._place.node,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=self.model.id,
            state=self.state,
            slots=self.slots,
            slots_used=len(self._held),
            started_at=self._place.started_at,
            heartbeat_at=time.time(),
            stats=stats | totals.gauges,
            about=dict(backend.about) if backend else {},
        )


def named(backend: Backend, model: CatalogModel) -> Backend:
    """The backend under the catalog's name, with no more context than the catalog gives."""
    card = backend.card
    context = min(card.context, model.context or card.context)
    backend.card = replace(card, id=model.id, context=context)
    return backend


class Rate:
    """How fast a counter has grown of late."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque()

    def seen(self, count: float) -> float:
        """Note the counter; growth a second over the last minute."""
        now = self._clock()
        self._seen.append((now, count))
        while len(self._seen) > 2 and self._seen[1][0] <= now - LATELY_S:
            self._seen.popleft()
        began, first = self._seen[0]
        return (count - first) / (now - began) if now > began else 0.0
