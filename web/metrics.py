"""Metrics for Prometheus.

prometheus_flask_exporter measures requests. Counters of jobs and streams are summed over all API processes. The state
of queues and workers is read from Redis at each scrape.
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
from shared.redis.client import Redis
from web.background.metrics import background_metrics

_FIRST_CHUNK_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

WORKER_HELP: Final = {
    "slots": "Maximum rows in the decode batch",
    "slots_used": "Rows in the batch",
    "claimed_jobs": "Jobs that the worker has claimed and not finished, including those in the batch",
    "batch_size": "Rows that got a token in the last step",
    "steps": "Engine steps since the start",
    "generated_tokens": "Tokens generated since the start",
    "prompt_tokens": "Prompt tokens prefilled since the start, excluding those from the prefix cache",
    "tokens_per_s": "Generated tokens per second over the last minute",
    "engine_idle_s": "Seconds without progress while there are rows",
    "publisher_backlog": "Jobs with output that Redis has not confirmed yet",
    "preemptions_total": "Rows preempted because memory ran short",
    "prefill_chunk_tokens": "Tokens of the last prefill chunk that ran together with decoding rows",
    "length_buckets": "Length buckets in use; each costs one forward pass per step",
    "load_s": "Seconds that loading the model took",
    "load_progress": "Fraction of the model that is loaded, 0 to 1",
    "model_bytes": "Bytes of the model's weights",
    "pinned": "1 if the model is pinned",
    "kv_bytes": "Bytes of the KV caches of all rows",
    "memory_active_bytes": "Bytes in use by MLX in the worker process",
    "memory_spare_bytes": "Bytes of free memory that MLX keeps for reuse in the worker process",
    "memory_peak_bytes": "Peak of the bytes in use by MLX in the worker process",
    "prefix_cache_bytes": "Bytes of cached prefixes in memory",
    "prefix_cache_entries": "Runs of tokens in the prefix trees",
    "prefix_cache_lookups_total": "Prompts for which a cached prefix was looked up",
    "prefix_cache_hits_total": "Prompts for which a cached prefix was found",
    "prefix_cache_tokens_total": "Prompt tokens that came from the prefix cache",
    "prefix_disk_bytes": "Bytes of evicted prefixes on disk",
    "prefix_disk_read_blocks_total": "Blocks of 128 tokens read from disk",
    "prefix_disk_written_blocks_total": "Blocks of 128 tokens written to disk",
    "speculation_drafted_tokens_total": "Draft tokens that were verified",
    "speculation_accepted_tokens_total": "Draft tokens that were accepted",
    "images_encoded_total": "Images processed by the vision encoder",
    "image_cache_hits_total": "Images whose encoding was found in the cache",
    "image_cache_bytes": "Bytes of cached image encodings",
}
"""Help texts of the numbers that workers report in `WorkerInfo.stats`. docs/metrics.md has the same texts."""


class Metrics:
    """The counters of this process, and the `/metrics` page."""

    def __init__(self, client: Redis) -> None:
        own = self._own = CollectorRegistry()
        self._cluster = ClusterCollector(client)
        self.submitted = Counter("mlxq_jobs_submitted", "Jobs accepted", ["model", "priority"], registry=own)
        self.streams_open = Gauge("mlxq_streams_open", "Streams being sent", registry=own, multiprocess_mode="livesum")
        self.chunks = Counter("mlxq_stream_chunks", "Chunks sent on streams", registry=own)
        # prometheus_flask_exporter measures only the creation of a streaming response.
        self.first_chunk = Histogram(
            "mlxq_stream_first_chunk_seconds",
            "Time from opening a stream to its first chunk",
            registry=own,
            buckets=_FIRST_CHUNK_BUCKETS,
        )

    def register(self, app: Flask) -> None:
        """Count and time the application's requests, by route instead of path, because paths contain ids."""
        PrometheusMetrics(app, path=None, registry=self._own, group_by="url_rule")

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in a format that the Accept header allows, and the content type."""
        registry = self._own
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        generate, content_type = choose_encoder(accept)
        return generate(_Combined((registry, self._cluster))), content_type


class _Combined(CollectorRegistry):
    """Collects from several sources."""

    def __init__(self, sources: Iterable[CollectorRegistry | Collector]) -> None:
        super().__init__()
        self._sources = tuple(sources)

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            yield from source.collect()


class ClusterCollector(Collector):
    """Collects the state of queues, workers, batches and webhooks from Redis."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._registry = Registry(client)

    def collect(self) -> Iterator[Metric]:
        """Yield the current state; only `mlxq_redis_up` if Redis is unavailable."""
        try:
            workers = _worker_metrics(self._registry.workers())
            metrics = [*self._queues(), *workers, *background_metrics(self._client)]
        except redis.RedisError:
            metrics = []
        yield GaugeMetricFamily("mlxq_redis_up", "Whether Redis answers", value=float(bool(metrics)))
        yield from metrics

    def _queues(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("mlxq_jobs_waiting", "Jobs in the queue", labels=["model"])
        for model in self._registry.models():
            waiting.add_metric([model], self._registry.waiting(model))
        ended = CounterMetricFamily("mlxq_jobs_ended", "Jobs that ended", labels=["model", "status"])
        for labels, count in self._registry.ended().items():
            ended.add_metric(labels, count)
        routed_help = "Jobs claimed by the worker that holds their prefix, deferred to it, or then claimed by another"
        routed = CounterMetricFamily("mlxq_jobs_routed", routed_help, labels=["model", "outcome"])
        for labels, count in self._registry.routed().items():
            routed.add_metric(labels, count)
        yield from (waiting, ended, routed)


def _worker_metrics(workers: Iterable[WorkerInfo]) -> Iterator[Metric]:
    """Yield the numbers that workers report, labeled with the name of the process, which restarts do not change."""
    # The card of a process that has died can still exist when its successor announces itself: the newest one counts.
    newest = {(each.node, each.model): each for each in sorted(workers, key=lambda each: each.heartbeat_at)}
    families: dict[str, Metric] = {}
    for (process, model), worker in sorted(newest.items()):
        numbers = {"slots": worker.slots, "slots_used": worker.slots_used, **worker.stats}
        for name, value in numbers.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = f"mlxq_worker_{name.removesuffix('_total')}"
            help_text = WORKER_HELP.get(name, f"As a worker reports it: {name}")
            family = families.setdefault(metric, kind(metric, help_text, labels=["worker", "model"]))
            family.add_metric([process, model], value)  # type: ignore[attr-defined]
    yield from families.values()
