"""A cached view of models and workers, so that not every request has to read them from Redis.

If several requests find the snapshot stale at the same time, one of them reads the next one and the others wait for it.
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
_TIMEOUT_S: Final = 10.0
"""Longest wait for a snapshot that another request reads. The Redis client's timeouts and retries take less."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The models and workers in Redis at one moment.

    Attributes:
        mean_job_s: mean duration of a model's jobs in seconds, if any have ended.
        taken_at: when the reading began, by the monotonic clock.
        hosts: worker processes, including those without a model.
    """

    models: dict[str, ModelCard]
    workers: tuple[WorkerInfo, ...]
    mean_job_s: dict[str, float]
    taken_at: float
    hosts: tuple[HostInfo, ...] = ()

    def ready_workers(self, model: str) -> list[WorkerInfo]:
        """Return the workers that take jobs of a model."""
        return [worker for worker in self.workers if worker.model == model and worker.state == "ready"]

    def has(self, model: str) -> bool:
        """Whether any worker has a model or is loading it."""
        return any(worker.model == model for worker in self.workers)

    def estimated_start_s(self, model: str, position: int) -> float | None:
        """Estimate in how many seconds the job at a queue position starts; None if that cannot be estimated."""
        ready = self.ready_workers(model)
        slots = sum(worker.slots for worker in ready)
        free = slots - sum(worker.slots_used for worker in ready)
        if not slots:
            return None
        if position <= free:
            return 0.0
        mean_s = self.mean_job_s.get(model)
        # When all slots are in use, one becomes free every `mean_s / slots` seconds.
        return None if mean_s is None else round((position - free) * mean_s / slots, 3)


class Cluster:
    """Provides the current snapshot."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._snapshot: ClusterSnapshot | None = None
        self._pending: tuple[float, Future[ClusterSnapshot]] | None = None

    def snapshot(self, max_age_s: float = _MAX_AGE_S) -> ClusterSnapshot:
        """Return a snapshot whose reading began at most `max_age_s` seconds before this call.

        Raises:
            redis.RedisError: Redis is unavailable. All requests that waited for the same snapshot get the error; the
                next request tries again.
        """
        oldest = time.monotonic() - max_age_s
        while True:  # at most twice: a reading that was in progress may be too old, the next one is not
            with self._lock:
                if self._snapshot is not None and self._snapshot.taken_at >= oldest:
                    return self._snapshot
                pending, is_reader = self._pending, self._pending is None
                if pending is None:
                    pending = self._pending = time.monotonic(), Future()
            began_at, future = pending
            snapshot = self._read_for_all(began_at, future) if is_reader else _wait_for(future)
            if began_at >= oldest:
                return snapshot

    def _read_for_all(self, began_at: float, future: Future[ClusterSnapshot]) -> ClusterSnapshot:
        try:
            snapshot = self._read(began_at)
        except BaseException as error:
            self._finish(None)
            # If this greenlet is killed, the requests that wait must not get its GreenletExit.
            shared = error if isinstance(error, Exception) else redis.ConnectionError("the reading was interrupted")
            future.set_exception(shared)
            raise
        self._finish(snapshot)
        future.set_result(snapshot)
        return snapshot

    def _finish(self, snapshot: ClusterSnapshot | None) -> None:
        with self._lock:
            self._snapshot, self._pending = snapshot or self._snapshot, None

    def _read(self, began_at: float) -> ClusterSnapshot:
        workers = tuple(self._registry.workers())
        return ClusterSnapshot(
            models=self._registry.models(),
            workers=workers,
            mean_job_s=self._registry.mean_job_s({worker.model for worker in workers}),
            taken_at=began_at,
            hosts=tuple(self._registry.hosts()),
        )


def _wait_for(future: Future[ClusterSnapshot]) -> ClusterSnapshot:
    try:
        return future.result(_TIMEOUT_S)
    except TimeoutError as error:
        if future.done():  # the reading itself raised this error
            raise
        raise redis.TimeoutError("the state of the cluster was not read in time") from error
