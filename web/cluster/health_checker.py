"""Health of the service: which workers are alive, how fast they respond, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import redis
from redis.exceptions import AuthenticationError, AuthorizationError

from shared import VERSION
from shared.models.catalog import Catalog
from shared.models.registry import Registry, WorkerInfo
from shared.redis.client import Redis, has_memory
from shared.redis.durability import why_unproven
from shared.redis.requirements import find_faults
from shared.settings import Settings
from web.cluster.archive_state import read_state
from web.cluster.ping import WorkerPing
from web.schemas.health import HealthStatus, HealthView, RedisView, WorkerMemory, WorkerView

_NEARLY_FULL: Final = 0.9
_IDLE: Final = "No model is loaded. The first job will load its model."


class HealthChecker:
    """Checks the service within a second, even if Redis or workers are down.

    Args:
        probe: a Redis client with short timeouts and without retries.
    """

    def __init__(self, settings: Settings, catalog: Catalog, probe: Redis, worker_ping: WorkerPing) -> None:
        self._settings = settings
        self._catalog = catalog
        self._probe = probe
        self._registry = Registry(probe)
        self._worker_ping = worker_ping

    def ready(self) -> bool:
        """Whether a job submitted now would run."""
        try:
            return any(worker.state == "ready" for worker in self._registry.workers()) or self._can_load_on_demand()
        except redis.RedisError:
            return False

    def check(self, *, ping: bool = True) -> HealthView:
        """Check Redis, the workers and the queues.

        Args:
            ping: whether to wait for answers of the workers' processes.
        """
        faults: list[str] = []
        try:
            faults += self._redis_faults()
            return self._check(faults, ping=ping)
        except redis.RedisError as error:
            if isinstance(error, (AuthenticationError, AuthorizationError)):
                faults = ["Redis rejects the user name or the password. Correct REDIS_URL."]
            view = RedisView(reachable=bool(faults), response_s=None)
            reasons = faults or ["Redis does not respond."]
            return HealthView(
                status="down", models=0, version=VERSION, reasons=reasons, redis=view, workers=[], queues={}
            )

    def _check(self, faults: list[str], *, ping: bool) -> HealthView:
        sent_at = time.monotonic()
        self._probe.ping()
        redis_view = RedisView(reachable=True, response_s=round(time.monotonic() - sent_at, 6))
        now, workers = self._registry.workers_now()
        queues = self._queues()
        views = self._worker_views(now, workers, ping=ping)
        reasons = [
            *faults,
            *self._durability_reasons(),
            *self._memory_reasons(),
            *self._archive_reasons(),
            *_worker_reasons(views, self._settings.lease_s, pinged=ping),
            *self._queue_reasons(workers, queues),
        ]
        status: HealthStatus = "degraded" if reasons else "ok"
        ready = {worker.model for worker in workers if worker.state == "ready"}
        if not ready:
            idle = self._can_load_on_demand()
            status = "degraded" if idle else "down"
            reasons.insert(0, _IDLE if idle else "No worker is ready.")
        return HealthView(
            status=status,
            models=len(ready),
            version=VERSION,
            reasons=reasons,
            redis=redis_view,
            workers=views,
            queues=queues,
        )

    def _queues(self) -> dict[str, int]:
        models = sorted({*self._registry.models(), self._catalog.default})
        return dict(zip(models, self._registry.waiting_each(models), strict=True))

    def _redis_faults(self) -> list[str]:
        """Return why Redis must not hold jobs, or cannot serve as the broker."""
        return [str(fault) for fault in find_faults(self._probe, broker=not self._settings.broker_url)]

    def _can_load_on_demand(self) -> bool:
        """Whether a worker without any model would load the one that a job needs."""
        return self._settings.load_on_demand and any(not host.models for host in self._registry.hosts())

    def _memory_reasons(self) -> list[str]:
        return [] if has_memory(self._probe) else ["Redis has no memory left, so no jobs are accepted."]

    def _archive_reasons(self) -> list[str]:
        if self._settings.archive_file is None:
            return []
        reason = read_state(self._probe).problem
        return [reason] if reason else []

    def _durability_reasons(self) -> list[str]:
        if not self._settings.durable:
            return ["Jobs are accepted without proof that Redis has written them to disk (DURABLE=false)."]
        reason = why_unproven(self._probe)
        return [reason] if reason else []

    def _worker_views(self, now: float, workers: list[WorkerInfo], *, ping: bool) -> list[WorkerView]:
        """Return the workers as of `now`, by Redis's clock, which their timestamps use too."""
        count = len({worker.node for worker in workers})
        response_s = self._worker_ping.response_times(count) if ping else {}
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

    def _queue_reasons(self, workers: list[WorkerInfo], queues: dict[str, int]) -> list[str]:
        served = {worker.model for worker in workers if worker.state == "ready"}
        nearly_full = self._settings.max_queue * _NEARLY_FULL
        return [
            *(
                f"Jobs are waiting for {model}, but no worker with this model is ready."
                for model, waiting in queues.items()
                if waiting and model not in served
            ),
            *(f"The queue of {model} is nearly full." for model, waiting in queues.items() if waiting >= nearly_full),
        ]


def _memory(stats: Mapping[str, float]) -> WorkerMemory | None:
    if "memory_active_bytes" not in stats:
        return None
    return WorkerMemory(
        active_bytes=round(stats["memory_active_bytes"]),
        cache_bytes=round(stats["memory_spare_bytes"]),
        peak_bytes=round(stats["memory_peak_bytes"]),
    )


def _worker_reasons(workers: list[WorkerView], lease_s: float, *, pinged: bool) -> list[str]:
    return [
        *(f"{_name(worker)} is {worker.state}." for worker in workers if worker.state != "ready"),
        *(f"{_name(worker)} does not answer pings." for worker in workers if pinged and worker.response_s is None),
        *(
            f"{_name(worker)} has not sent a heartbeat for {worker.heartbeat_age_s:.1f} s."
            for worker in workers
            if worker.heartbeat_age_s > lease_s
        ),
    ]


def _name(worker: WorkerView) -> str:
    return f"Worker {worker.node} ({worker.model})"
