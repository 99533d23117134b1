"""Metrics of batches, webhooks and the archive. They are read from Redis, so every API process reports the same."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shared.redis import keys
from shared.redis.client import Redis
from web.batches.store import BatchStatus
from web.cluster.archive_state import read_state

_UNFINISHED: Final = [status for status in BatchStatus if not status.terminal]
_ENDED: Final = [status for status in BatchStatus if status.terminal]
_MAX_READ: Final = 1000
"""Maximum unfinished batches whose status is read; the oldest ones count."""


def background_metrics(client: Redis) -> Iterator[Metric]:
    """Yield the state of the background process, of batches, of deliveries and of the archive.

    Raises:
        redis.RedisError: Redis is unavailable.
    """
    leads = float(client.exists(keys.LEADER))
    yield GaugeMetricFamily("mlxq_background_leader", "1 if a background process leads", value=leads)
    yield from _batches(client)
    yield from _webhooks(client)
    yield from _archive(client)


def _batches(client: Redis) -> Iterator[Metric]:
    ids = client.zrange(keys.UNFINISHED_BATCHES, 0, _MAX_READ - 1)
    with client.pipeline(transaction=False) as pipe:
        for batch_id in ids:
            pipe.hmget(keys.BATCH + batch_id, "status", "errors")
        records = pipe.execute()
    statuses = Counter(status for status, _ in records)
    unfinished = GaugeMetricFamily("mlxq_batches", "Unfinished batches", labels=["status"])
    for status in _UNFINISHED:
        unfinished.add_metric([status], statuses[status])
    paused = sum(bool(json.loads(errors or "[]")) for _, errors in records)
    counts = client.hgetall(keys.BATCH_COUNTS)
    ended = CounterMetricFamily("mlxq_batches_ended", "Batches that ended", labels=["status"])
    for status in _ENDED:
        ended.add_metric([status], int(counts.get(status, 0)))
    lines = CounterMetricFamily("mlxq_batch_lines", "Lines of batches that ended", labels=["outcome"])
    for outcome in ("completed", "failed"):
        lines.add_metric([outcome], int(counts.get(f"lines_{outcome}", 0)))
    yield from (unfinished, ended, lines)
    yield GaugeMetricFamily("mlxq_batches_paused", "Unfinished batches that wait for space on the disk", value=paused)


def _webhooks(client: Redis) -> Iterator[Metric]:
    with client.pipeline(transaction=False) as pipe:
        pipe.llen(keys.WEBHOOK_OUTBOX)
        pipe.lindex(keys.WEBHOOK_OUTBOX, 0)
        pipe.zcard(keys.WEBHOOKS_DUE)
        pipe.zrange(keys.WEBHOOKS_DUE, 0, 0, withscores=True)
        pipe.zcard(keys.WEBHOOKS_DEAD)
        pipe.hgetall(keys.WEBHOOK_COUNTS)
        events, oldest, pending, first, dead, counts = pipe.execute()
    since = [float(json.loads(oldest)["at"])] if oldest else []
    since += [due for _, due in first]
    lag = max([time.time() - moment for moment in since], default=0.0)
    deliveries = GaugeMetricFamily("mlxq_webhook_deliveries", "Deliveries that wait or are dead", labels=["status"])
    deliveries.add_metric(["pending"], pending)
    deliveries.add_metric(["dead"], dead)
    attempts = CounterMetricFamily("mlxq_webhook_attempts", "Attempts to deliver a webhook", labels=["outcome"])
    for outcome in ("delivered", "failed", "dead"):
        attempts.add_metric([outcome], int(counts.get(outcome, 0)))
    yield GaugeMetricFamily("mlxq_webhook_events_waiting", "Events that are not yet deliveries", value=events)
    yield from (deliveries, attempts)
    lag_help = "Seconds for which the longest waiting event or attempt is overdue"
    yield GaugeMetricFamily("mlxq_webhook_lag_seconds", lag_help, value=max(0.0, lag))
    dropped = int(counts.get("dropped", 0))
    yield CounterMetricFamily("mlxq_webhook_events_dropped", "Events dropped from a full outbox", value=dropped)


def _archive(client: Redis) -> Iterator[Metric]:
    state = read_state(client)
    up_help = "0 if the archive could not be read or written at the last attempt"
    yield GaugeMetricFamily("mlxq_archive_up", up_help, value=float(not state.error))
    yield GaugeMetricFamily("mlxq_archive_jobs_waiting", "Ended jobs that are not archived yet", value=state.waiting)
    lag_help = "Seconds for which the first ended job has waited for the archive"
    yield GaugeMetricFamily("mlxq_archive_lag_seconds", lag_help, value=state.oldest_s)
    yield GaugeMetricFamily("mlxq_archive_bytes", "Size of the archive's content", value=state.bytes)
    yield CounterMetricFamily("mlxq_archive_jobs_written", "Jobs written to the archive", value=state.written)
