"""What Prometheus collects.

Requests (by prometheus_flask_exporter), jobs and streams of all API processes, and the state of queues and workers,
read from Redis at each scrape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final

import redis
from flask import Flask
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_flask_exporter import PrometheusMetrics

from shared.models.registry import Registry, WorkerInfo

_FIRST_CHUNK_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

WORKER_HELP: Final = {
    "slots": "Maximum rows in the decode batch",
    "slots_used": "Rows in the batch",
    "claimed_jobs": "Jobs that the worker has claimed and not finished, those in the batch included",
    "batch_size": "Rows that got a token in the last step",
    "steps": "Engine steps since the start",
    "generated_tokens": "Tokens generated since the start",
    "prompt_tokens": "Prompt tokens prefilled since the start, without those from the prefix cache",
    "tokens_per_s": "Generated tokens per second over the last minute",
    "engine_idle_s": "Seconds without progress while there are rows",
    "publisher_backlog": "Jobs with output that Redis has not confirmed yet",
    "preemptions_total": "Rows taken out of the batch because memory ran short",
    "prefill_chunk_tokens": "Tokens of the last chunk of a long prompt beside decoding rows",
    "length_buckets": "Length buckets in use; each costs one forward pass per step",
    "load_s": "Seconds that loading the model took",
    "load_progress": "Part of the model that is loaded, 0 to 1",
    "model_bytes": "Bytes of the model's weights",
    "pinned": "1 if the model is pinned",
    "kv_bytes": "Bytes of the KV caches of all rows",
    "memory_active_bytes": "Bytes in use by MLX in the worker process",
    "memory_spare_bytes": "Bytes that MLX keeps for later use in the worker process",
    "memory_peak_bytes": "Maximum number of bytes that MLX has used in the worker process",
    "prefix_cache_bytes": "Bytes of cached prefixes in memory",
    "prefix_cache_entries": "Runs of tokens in the prefix trees",
    "prefix_cache_lookups_total": "Prompts for which a cached prefix was looked up",
    "prefix_cache_hits_total": "Prompts for which a cached prefix was found",
    "prefix_cache_tokens_total": "Prompt tokens that came from the prefix cache",
    "prefix_disk_bytes": "Bytes of the folder of evicted prefixes",
    "prefix_disk_read_blocks_total": "Blocks of 128 tokens read from disk",
    "prefix_disk_written_blocks_total": "Blocks of 128 tokens written to disk",
    "speculation_drafted_tokens_total": "Draft tokens that were verified",
    "speculation_accepted_tokens_total": "Draft tokens that were accepted",
    "images_encoded_total": "Images that went through the encoder",
    "image_cache_hits_total": "Images whose encoding was still cached",
    "image_cache_bytes": "Bytes of cached image encodings",
}
"""Help texts of what workers report, by the name there. docs/metrics.md lists the same."""


class Metrics:
    """This process's own counters, and the page that sums up those of all processes."""

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
        waiting = GaugeMetricFamily("mlxq_jobs_waiting", "Jobs in the queue", labels=["model"])
        for model in self._registry.models():
            waiting.add_metric([model], self._registry.waiting(model))
        ended = CounterMetricFamily("mlxq_jobs_ended", "Jobs that ended", labels=["model", "status"])
        for labels, count in self._registry.ended().items():
            ended.add_metric(labels, count)
        about = "Jobs claimed by the worker that holds their prefix, deferred to it, or claimed by another after that"
        routed = CounterMetricFamily("mlxq_jobs_routed", about, labels=["model", "outcome"])
        for labels, count in self._registry.routed().items():
            routed.add_metric(labels, count)
        yield from (waiting, ended, routed)


def _workers(workers: Iterable[WorkerInfo]) -> Iterator[Metric]:
    """What workers report, labelled with the name of the process, which stays the same over restarts."""
    # The card of a process that died is still there while its successor has announced itself: the newest one counts.
    newest = {(each.node, each.model): each for each in sorted(workers, key=lambda each: each.heartbeat_at)}
    families: dict[str, Metric] = {}
    for (process, model), worker in sorted(newest.items()):
        numbers = {"slots": worker.slots, "slots_used": worker.slots_used, **worker.stats}
        for name, value in numbers.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = f"mlxq_worker_{name.removesuffix('_total')}"
            about = WORKER_HELP.get(name, f"As a worker reports it: {name}")
            family = families.setdefault(metric, kind(metric, about, labels=["worker", "model"]))
            family.add_metric([process, model], value)  # type: ignore[attr-defined]
    yield from families.values()
