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

from shared.jobs.record import Priority
from shared.jobs.store import Place
from shared.models.registry import HostInfo, ModelCard, Registry, Speed, Starts, WorkerInfo

_MAX_AGE_S: Final = 0.5
_TIMEOUT_S: Final = 10.0
"""Longest wait for a snapshot that another request reads. The Redis client's timeouts and retries take less."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """The models and workers in Redis at one moment.

    Attributes:
        speeds: how fast jobs run and start, by model.
        taken_at: when the reading began, by the monotonic clock.
        hosts: worker processes, including those without a model.
    """

    models: dict[str, ModelCard]
    workers: tuple[WorkerInfo, ...]
    speeds: dict[str, Speed]
    taken_at: float
    hosts: tuple[HostInfo, ...] = ()

    def ready_workers(self, model: str) -> list[WorkerInfo]:
        """Return the workers that take jobs of a model."""
        return [worker for worker in self.workers if worker.model == model and worker.state == "ready"]

    def has(self, model: str) -> bool:
        """Whether any worker has a model or is loading it."""
        return any(worker.model == model for worker in self.workers)

    def estimated_start_s(self, model: str, place: Place, priority: Priority = Priority.NORMAL) -> float | None:
        """Estimate in how many seconds a job at a place in the queue starts; None if that cannot be estimated."""
        ready = self.ready_workers(model)
        slots, speed = sum(worker.slots for worker in ready), self.speeds.get(model, Speed())
        if not slots:
            return None
        if place.max_running:
            mean_s = speed.mean_s
            return None if mean_s is None else round(place.position * mean_s / place.max_running, 3)
        reserved = sum(worker.stats.get("reserved_rows", 0) for worker in ready) if priority is Priority.BATCH else 0
        free = slots - sum(worker.slots_used for worker in ready) - reserved
        if place.position <= free:
            return 0.0
        return _start_s(speed, place, priority, slots, free)


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
            speeds=self._registry.speeds({worker.model for worker in workers}),
            taken_at=began_at,
            hosts=tuple(self._registry.hosts()),
        )


def _start_s(speed: Speed, place: Place, priority: Priority, slots: int, free: float) -> float | None:
    """Estimate the seconds until a job starts if its model has too few free slots; None if nothing was measured.

    The job starts when its class reaches its turn, and not before the jobs of its class that are in front of it. Turns
    decide for a key with many jobs: the measured rate accounts for jobs of other keys and classes that come later but
    start earlier. The number of jobs decides for a key whose jobs are always next: several keys can have the same turn.

    The measured rates are wrong after many jobs have started in empty slots. So the result is a weighted mean of the
    measurement, weighted by its number of starts, and of the prediction from mean running time and slots, weighted by
    the number of slots.
    """
    if speed.mean_s is None:
        return None
    predicted_s = max(0.0, place.position - free) * speed.mean_s / slots
    starts = speed.starts.get(priority, Starts())
    if not starts.turns:
        return round(predicted_s, 3)
    in_front = max(place.turns / starts.turns, (place.position - place.higher) / starts.number)
    measured_s = in_front * starts.seconds
    return round((starts.number * measured_s + slots * predicted_s) / (starts.number + slots), 3)


def _wait_for(future: Future[ClusterSnapshot]) -> ClusterSnapshot:
    try:
        return future.result(_TIMEOUT_S)
    except TimeoutError as error:
        if future.done():  # the reading itself raised this error
            raise
        raise redis.TimeoutError("the state of the cluster was not read in time") from error
