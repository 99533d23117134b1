"""The metrics of the API itself, and the page with all metrics.

prometheus_flask_exporter measures requests. Counters of jobs and streams are summed over all API processes of the
machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from flask import Flask
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_flask_exporter import PrometheusMetrics

_FIRST_CHUNK_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of this process, and the `/metrics` page.

    Args:
        others: collectors of further metrics of the page.
    """

    def __init__(self, others: Iterable[Collector] = ()) -> None:
        own = self._own = CollectorRegistry()
        self._others = tuple(others)
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
        return generate(_Combined((registry, *self._others))), content_type


class _Combined(CollectorRegistry):
    """Collects from several sources."""

    def __init__(self, sources: Iterable[CollectorRegistry | Collector]) -> None:
        super().__init__()
        self._sources = tuple(sources)

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            yield from source.collect()
