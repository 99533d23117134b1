"""How the service is: which workers live, how fast they answer, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import redis

from shared.models.catalog import Catalog
from shared.models.registry import Registry, WorkerInfo
from shared.queue.durability import why_unproven
from shared.queue.redis import Redis, has_memory
from shared.settings import Settings
from web.cluster.ping import WorkerPing
from web.schemas.health import HealthView, RedisView, WorkerMemory, WorkerView

_ABSENT: Final = RedisView(reachable=False, response_s=None)
_NEARLY_FULL: Final = 0.9
_IDLE: Final = "No model is loaded; a job has its own loaded."


class HealthChecker:
    """Examines the service within a second, whatever is gone. Its client has short timeouts and no retries."""

    def __init__(self, settings: Settings, catalog: Catalog, probe: Redis, worker_ping: WorkerPing) -> None:
        self._settings = settings
        self._catalog = catalog
        self._probe = probe
        self._registry = Registry(probe)
        self._worker_ping = worker_ping

    def ready(self) -> bool:
        """Whether a job submitted now would be run."""
        try:
            return any(worker.state == "ready" for worker in self._registry.workers()) or self._would_load()
        except redis.RedisError:
            return False

    def check(self) -> HealthView:
        """The whole picture."""
        try:
            asked_at = time.monotonic()
            self._probe.ping()
            answered = RedisView(reachable=True, response_s=round(time.monotonic() - asked_at, 6))
            now, workers = self._registry.workers_now()
            models = sorted({*self._registry.models(), self._catalog.default})
            queues = dict(zip(models, self._registry.waiting_each(models), strict=True))
            would_load = self._would_load()
            store_faults = [*self._durability_faults(), *self._memory_faults()]
        except redis.RedisError:
            return HealthView(status="down", reasons=["Redis does not answer."], redis=_ABSENT, workers=[], queues={})
        views = self._workers(now, workers)
        reasons = [*store_faults, *_worker_faults(views, self._settings.lease_s), *self._queue_faults(workers, queues)]
        if not any(worker.state == "ready" for worker in workers):
            return HealthView(
                status="degraded" if would_load else "down",
                reasons=[_IDLE if would_load else "No worker is ready.", *reasons],
                redis=answered,
                workers=views,
                queues=queues,
            )
        return HealthView(
            status="degraded" if reasons else "ok",
            reasons=reasons,
            redis=answered,
            workers=views,
            queues=queues,
        )

    def _would_load(self) -> bool:
        """Whether some worker has no model because all were unloaded, and would load the one that a job asks for."""
        return self._settings.load_on_demand and any(not host.models for host in self._registry.hosts())

    def _memory_faults(self) -> list[str]:
        return [] if has_memory(self._probe) else ["Redis has no memory left, so no job is accepted."]

    def _durability_faults(self) -> list[str]:
        if not self._settings.durable:
            return ["Jobs are accepted without proof that Redis keeps them (DURABLE=false)."]
        why = why_unproven(self._probe)
        return [why] if why else []

    def _workers(self, now: float, workers: list[WorkerInfo]) -> list[WorkerView]:
        """The workers as they were at `now`, by Redis's clock, as are the moments that they tell."""
        response_s = self._worker_ping.read(len({worker.node for worker in workers}))
        return [
            WorkerView(
                id=worker.id,
                host=worker.host,
                node=worker.node,
                model=worker.model,
                state=worker.state,
                heartbeat_age_s=round(max(0.0, now - worker.heartbeat_at), 3),
                response_s=response_s.get(worker.node),
                slots=worker.slots,
                slots_used=worker.slots_used,
                uptime_s=round(now - worker.started_at, 3),
                memory=_memory(worker.stats),
                about=worker.about,
            )
            for worker in workers
        ]

    def _queue_faults(self, workers: list[WorkerInfo], queues: dict[str, int]) -> list[str]:
        served = {worker.model for worker in workers if worker.state == "ready"}
        full = self._settings.max_queue * _NEARLY_FULL
        return [
            *(
                f"Jobs wait for {model}, which no ready worker has."
                for model in queues
                if queues[model] and model not in served
            ),
            *(f"The queue of {model} is nearly full." for model in queues if queues[model] >= full),
        ]


def _memory(stats: Mapping[str, float]) -> WorkerMemory | None:
    if "memory_active_bytes" not in stats:
        return None
    return WorkerMemory(
        active_bytes=round(stats["memory_active_bytes"]),
        cache_bytes=round(stats["memory_spare_bytes"]),
        peak_bytes=round(stats["memory_peak_bytes"]),
    )


def _worker_faults(workers: list[WorkerView], lease_s: float) -> list[str]:
    return [
        *(f"{_named(worker)} is {worker.state}." for worker in workers if worker.state != "ready"),
        *(f"{_named(worker)} does not answer pings." for worker in workers if worker.response_s is None),
        *(f"{_named(worker)} has been silent." for worker in workers if worker.heartbeat_age_s > lease_s),
    ]


def _named(worker: WorkerView) -> str:
    return f"Worker {worker.node} ({worker.model})"
