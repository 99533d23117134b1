"""Models and workers as they were a moment ago, so that Redis need not be asked for each request.

However many requests find the snapshot stale at the same moment, one of them takes the next one and the others wait for
it.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import redis

from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo

_MAX_AGE_S: Final = 0.5
_PATIENCE_S: Final = 10.0
"""Longest wait for a snapshot that another request takes. The client's own timeouts and retries take less."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The models and workers that Redis knew at `taken_at` (monotonic clock, when the reading began).

    `mean_job_s` has the models that have ended a job.
    """

    models: dict[str, ModelCard]
    workers: tuple[WorkerInfo, ...]
    mean_job_s: dict[str, float]
    taken_at: float
    hosts: tuple[HostInfo, ...] = ()

    def ready(self, model: str) -> list[WorkerInfo]:
        """The workers that take a model's jobs."""
        return [worker for worker in self.workers if worker.model == model and worker.state == "ready"]

    def has(self, model: str) -> bool:
        """Whether some worker has a model, or is loading it."""
        return any(worker.model == model for worker in self.workers)

    def estimated_start_s(self, model: str, position: int) -> float | None:
        """When a job at `position` of the queue starts, in seconds from now; None when that is not known."""
        ready = self.ready(model)
        slots = sum(worker.slots for worker in ready)
        ahead = position - (slots - sum(worker.slots_used for worker in ready))
        if not slots:
            return None
        if ahead <= 0:
            return 0.0
        mean_s = self.mean_job_s.get(model)
        # With all slots taken, one comes free every `mean_s / slots`.
        return None if mean_s is None else round(ahead * mean_s / slots, 3)


class Cluster:
    """The present snapshot, renewed when it is asked for and too old."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._snapshot: ClusterSnapshot | None = None
        self._pending: tuple[float, Future[ClusterSnapshot]] | None = None

    def now(self, max_age_s: float = _MAX_AGE_S) -> ClusterSnapshot:
        """A snapshot whose reading began at most `max_age_s` seconds before this call.

        Raises:
            redis.RedisError: Redis is away. All requests that waited for the same snapshot get the error; the next
                request tries again.
        """
        oldest = time.monotonic() - max_age_s
        while True:  # twice at most: a reading that was under way may be too old, the one behind it is not
            with self._lock:
                if self._snapshot is not None and self._snapshot.taken_at >= oldest:
                    return self._snapshot
                pending, mine = self._pending, self._pending is None
                if pending is None:
                    pending = self._pending = time.monotonic(), Future()
            began_at, future = pending
            snapshot = self._lead(began_at, future) if mine else _join(future)
            if began_at >= oldest:
                return snapshot

    def _lead(self, began_at: float, future: Future[ClusterSnapshot]) -> ClusterSnapshot:
        try:
            snapshot = self._take(began_at)
        except BaseException as error:
            self._settle(None)
            # Another request must not end as this one is killed.
            shared = error if isinstance(error, Exception) else redis.ConnectionError("reading was interrupted")
            future.set_exception(shared)
            raise
        self._settle(snapshot)
        future.set_result(snapshot)
        return snapshot

    def _settle(self, snapshot: ClusterSnapshot | None) -> None:
        with self._lock:
            self._snapshot, self._pending = snapshot or self._snapshot, None

    def _take(self, began_at: float) -> ClusterSnapshot:
        workers = tuple(self._registry.workers())
        return ClusterSnapshot(
            models=self._registry.models(),
            workers=workers,
            mean_job_s=self._registry.mean_job_s({worker.model for worker in workers}),
            taken_at=began_at,
            hosts=tuple(self._registry.hosts()),
        )


def _join(future: Future[ClusterSnapshot]) -> ClusterSnapshot:
    try:
        return future.result(_PATIENCE_S)
    except TimeoutError as error:
        if future.done():  # the reading itself failed so
            raise
        raise redis.TimeoutError("the cluster's state was not read in time") from error
