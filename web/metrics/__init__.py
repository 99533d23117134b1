"""Metrics for Prometheus: of the API (`counters.py`), the cluster, workers, batches and webhooks."""

from web.metrics.counters import Metrics

__all__ = ["Metrics"]
