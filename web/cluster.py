"""Models and workers as they were a moment ago: what every request asks and Redis need not answer each time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo

_MAX_AGE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Who was there at `taken_at` (of the monotonic clock). `mean_job_s` has the models that have ended a job."""

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
        """When a job at `position` of the line starts, in seconds from now; None when nobody can tell."""
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


class Roster:
    """A snapshot that is renewed when it is asked for and older than half a second."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._snapshot: Snapshot | None = None

    def now(self, max_age_s: float = _MAX_AGE_S) -> Snapshot:
        """The present snapshot; not older than so many seconds.

        Raises:
            redis.RedisError: Redis is away.
        """
        snapshot = self._snapshot
        if snapshot is None or time.monotonic() - snapshot.taken_at > max_age_s:
            snapshot = self._snapshot = self._take()
        return snapshot

    def _take(self) -> Snapshot:
        workers = tuple(self._registry.workers())
        means = {model: self._registry.mean_job_s(model) for model in {worker.model for worker in workers}}
        return Snapshot(
            models=self._registry.models(),
            workers=workers,
            mean_job_s={model: mean_s for model, mean_s in means.items() if mean_s is not None},
            taken_at=time.monotonic(),
            hosts=tuple(self._registry.hosts()),
        )
