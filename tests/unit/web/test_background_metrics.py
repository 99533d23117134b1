"""Metrics of batches and webhooks, as they are read from Redis."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest

from shared.redis import keys
from shared.redis.client import Redis
from web.background.leader import Leadership
from web.batches.store import Batch, Batches, BatchStatus, Counts
from web.metrics.background import background_metrics
from web.metrics.cluster import ClusterCollector
from web.webhooks.deliveries import Deliveries

LEADER = "leader-1"


def values(client: Redis, name: str) -> dict[str, float]:
    """The values of a metric by its label, which is empty if it has none."""
    (family,) = [each for each in background_metrics(client) if each.name == name]
    return {"".join(sample.labels.values()): sample.value for sample in family.samples}


@pytest.fixture
def batches(client: Redis) -> Batches:
    client.set(keys.LEADER, LEADER)
    return Batches(client, durable=False, retention_s=3600)


def create(batches: Batches, name: str) -> Batch:
    return batches.create(
        name, "me", endpoint="/v1/completions", input_file_id="file_1", completion_window="24h", window_s=86_400,
        metadata={},
    )  # fmt: skip


def change(batches: Batches, name: str, status: BatchStatus, before: BatchStatus, **fields: str) -> Batch | None:
    return batches.change(name, status, [before], LEADER, fields)


def counts(completed: int, failed: int) -> str:
    return json.dumps(asdict(Counts(total=10, completed=completed, failed=failed)))


def test_batches_count_by_status_and_lines_by_outcome(client: Redis, batches: Batches) -> None:
    for name in ("a", "b", "c"):
        create(batches, name)
    running, done = BatchStatus.IN_PROGRESS, BatchStatus.COMPLETED
    change(batches, "a", running, BatchStatus.VALIDATING, counts=counts(0, 0))
    for completed, failed in [(3, 1), (3, 1), (8, 2)]:
        change(batches, "a", running, running, counts=counts(completed, failed))
    change(batches, "b", running, BatchStatus.VALIDATING, counts=counts(0, 0))
    errors = json.dumps([{"code": "disk_full", "message": "full"}])
    change(batches, "b", running, running, counts=counts(4, 0), errors=errors)
    unfinished = {"validating": 1, "in_progress": 2, "finalizing": 0, "cancelling": 0}
    assert values(client, "mlxq_batches") == unfinished
    assert values(client, "mlxq_batches_paused") == {"": 1}
    assert values(client, "mlxq_batch_lines") == {"completed": 12, "failed": 2}
    assert change(batches, "a", done, running) is not None
    assert change(batches, "a", done, running) is None, "an answer was lost and the call repeated"
    assert values(client, "mlxq_batches_ended") == {"failed": 0, "completed": 1, "expired": 0, "cancelled": 0}


def test_deliveries_count_by_outcome_and_age(client: Redis, batches: Batches) -> None:
    assert values(client, "mlxq_webhook_lag_seconds") == {"": 0}
    client.hset(keys.WEBHOOK_ENDPOINTS, "we", json.dumps({"id": "we", "url": "u", "events": ["batch.failed"]}))
    deliveries = Deliveries(client, max_attempts=2, backoff_s=600)
    for name in ("a", "b", "c", "d"):
        create(batches, name)
        change(batches, name, BatchStatus.FAILED, BatchStatus.VALIDATING)
    assert values(client, "mlxq_webhook_events_waiting") == {"": 4}
    assert deliveries.fan_out(LEADER) == 4
    first, second, third, fourth = deliveries.due(4)
    for delivery_id, final in [(first, False), (second, True), (third, False)]:
        delivery = deliveries.begin_attempt(delivery_id, LEADER, 60)
        assert delivery is not None
        if delivery_id == third:
            deliveries.succeed(delivery, 200)
            deliveries.succeed(delivery, 200)
        else:
            deliveries.fail(delivery, 500, "no", final=final)
    assert values(client, "mlxq_webhook_events_waiting") == {"": 0}
    assert values(client, "mlxq_webhook_deliveries") == {"pending": 2, "dead": 1}
    assert values(client, "mlxq_webhook_attempts") == {"delivered": 1, "failed": 1, "dead": 1}
    client.zadd(keys.WEBHOOKS_DUE, {fourth: time.time() - 100})
    assert 100 <= values(client, "mlxq_webhook_lag_seconds")[""] < 160


def test_the_lag_includes_events_that_no_process_takes(client: Redis) -> None:
    client.rpush(keys.WEBHOOK_OUTBOX, json.dumps({"kind": "batch.failed", "at": f"{time.time() - 50:.6f}"}))
    assert 50 <= values(client, "mlxq_webhook_lag_seconds")[""] < 110


def test_the_page_says_whether_a_process_leads(client: Redis) -> None:
    assert values(client, "mlxq_background_leader") == {"": 0}
    leadership = Leadership(client)
    assert leadership.acquire()
    assert values(client, "mlxq_background_leader") == {"": 1}
    assert "mlxq_background_leader" in {each.name for each in ClusterCollector(client).collect()}
