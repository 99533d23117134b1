"""What Prometheus collects.

Requests (by prometheus_flask_exporter), jobs and streams of all API processes, and the state of queues and workers,
read from Redis at each scrape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import redis
from flask import Flask
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_flask_exporter import PrometheusMetrics

from shared.models.registry import Registry, WorkerInfo

_FIRST_CHUNK_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """This process's own counters, and the page that adds up all processes'."""

    def __init__(self, fleet: Registry) -> None:
        own = self._own = CollectorRegistry()
        self._fleet = FleetCollector(fleet)
        self.submitted = Counter("mlxq_jobs_submitted", "Jobs accepted", ["model", "priority"], registry=own)
        self.streams_open = Gauge("mlxq_streams_open", "Streams being sent", registry=own, multiprocess_mode="livesum")
        self.chunks = Counter("mlxq_stream_chunks", "Chunks sent on streams", registry=own)
        # prometheus_flask_exporter times how long a streaming answer takes to be created, not to flow.
        self.first_chunk = Histogram(
            "mlxq_stream_first_chunk_seconds",
            "From the opening of a stream to its first chunk",
            registry=own,
            buckets=_FIRST_CHUNK_BUCKETS,
        )

    def register(self, app: Flask) -> None:
        """Count and time the application's requests, by route and not by path: paths have ids in them."""
        PrometheusMetrics(app, path=None, registry=self._own, group_by="url_rule")

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and their content type."""
        registry = self._own
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        generate, content_type = choose_encoder(accept)
        return generate(_Joined((registry, self._fleet))), content_type


class _Joined(CollectorRegistry):
    """Several sources as one."""

    def __init__(self, sources: Iterable[CollectorRegistry | Collector]) -> None:
        super().__init__()
        self._sources = tuple(sources)

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            yield from source.collect()


class FleetCollector(Collector):
    """Queues and workers, as Redis knows them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The present state; only `mlxq_redis_up` when Redis is away."""
        try:
            found = [*self._queues(), *_workers(self._registry.workers())]
        except redis.RedisError:
            found = []
        yield GaugeMetricFamily("mlxq_redis_up", "Whether Redis answers", value=float(bool(found)))
        yield from found

    def _queues(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("mlxq_jobs_waiting", "Jobs in line", labels=["model"])
        for model in self._registry.models():
            waiting.add_metric([model], self._registry.waiting(model))
        ended = CounterMetricFamily("mlxq_jobs_ended", "Jobs that ended", labels=["model", "status"])
        for labels, count in self._registry.ended().items():
            ended.add_metric(labels, count)
        told = "Jobs that went to the worker that keeps their prefix, were left to it first, or went to another"
        routed = CounterMetricFamily("mlxq_jobs_routed", told, labels=["model", "outcome"])
        for labels, count in self._registry.routed().items():
            routed.add_metric(labels, count)
        yield from (waiting, ended, routed)


def _workers(workers: Iterable[WorkerInfo]) -> Iterator[Metric]:
    families: dict[str, Metric] = {}
    for worker in workers:
        numbers = {"slots": worker.slots, "slots_used": worker.slots_used, **worker.stats}
        for name, value in numbers.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = f"mlxq_worker_{name.removesuffix('_total')}"
            family = families.setdefault(
                metric, kind(metric, f"Told by the worker: {name}", labels=["worker", "model"])
            )
            family.add_metric([worker.id, worker.model], value)  # type: ignore[attr-defined]
    yield from families.values()
