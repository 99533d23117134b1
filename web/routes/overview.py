"""`/v1/overview`: the state of queues and workers, now and over the last hour."""

from __future__ import annotations

from dataclasses import asdict

from flask import Blueprint, Response

from shared.models.registry import WorkerInfo
from shared.queue.depths import QueueDepth
from web.cluster.samples import memory_bytes, tokens_per_s
from web.http.openapi import describe
from web.schemas.overview import OverviewView, OverviewWorkerView, QueueView, SampleView
from web.services import services

routes = Blueprint("overview", __name__, url_prefix="/v1/overview")


@routes.get("")
@describe("Get the state of queues and workers", responses={200: OverviewView})
def get_overview() -> Response:
    """Queue depths, workers, throughput and latencies. The figures are those of the whole service."""
    return Response(overview().model_dump_json(), content_type="application/json")


def overview() -> OverviewView:
    """Read the state of the service."""
    current = services()
    now, workers = current.registry.workers_now()
    models = sorted({*current.registry.known_models(), *current.catalog.models})
    return OverviewView(
        queues=[_queue_view(depth) for depth in current.queue_depths.read(models)],
        workers=[_worker_view(now, worker) for worker in workers],
        tokens_per_s=tokens_per_s(workers),
        memory_bytes=memory_bytes(workers),
        samples=[SampleView.model_validate(asdict(sample)) for sample in current.samples.recent()],
    )


def _queue_view(depth: QueueDepth) -> QueueView:
    return QueueView(
        model=depth.model,
        priority=depth.priority.label,
        waiting=depth.waiting,
        oldest_s=round(depth.oldest_s, 3),
    )


def _worker_view(now: float, worker: WorkerInfo) -> OverviewWorkerView:
    stats = worker.stats
    return OverviewWorkerView(
        worker=worker.node,
        model=worker.model,
        state=worker.state,
        slots=worker.slots,
        slots_used=worker.slots_used,
        tokens_per_s=round(stats.get("tokens_per_s", 0.0), 1),
        memory_bytes=round(stats.get("memory_active_bytes", 0.0)),
        model_bytes=round(stats.get("model_bytes", 0.0)),
        uptime_s=round(max(0.0, now - worker.started_at), 3),
    )
