"""`/health`, the probes `/livez` and `/readyz`, and `/metrics` for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, request
from pydantic import BaseModel

from web.http.openapi import describe
from web.schemas.health import HealthView, ProbeView
from web.services import services

routes = Blueprint("health", __name__)


@routes.get("/health")
@describe("How the service is", answers={200: HealthView, 503: HealthView})
def health() -> Response:
    """Each worker with the response time of a real ping. 503 when no job can be run at present."""
    view = services().health_checker.check()
    return _answer(view, ok=view.status != "down")


@routes.get("/livez")
@describe("Whether this process lives", answers={200: ProbeView})
def livez() -> Response:
    """Says nothing of Redis or the workers: restarting this process would not help them."""
    return _answer(ProbeView(status="ok"), ok=True)


@routes.get("/readyz")
@describe("Whether a job would be run", answers={200: ProbeView, 503: ProbeView})
def readyz() -> Response:
    """200 when Redis answers and a worker is ready, or has no model and loads the one that a job asks for."""
    ready = services().health_checker.ready()
    return _answer(ProbeView(status="ok" if ready else "unavailable"), ok=ready)


@routes.get("/metrics")
@describe("Metrics for Prometheus", answers={200: "text/plain"})
def metrics() -> Response:
    """Of all API processes, the queues and the workers."""
    page, content_type = services().metrics.page(request.headers.get("Accept", ""))
    return Response(page, content_type=content_type)


def _answer(view: BaseModel, *, ok: bool) -> Response:
    answer = Response(view.model_dump_json(), 200 if ok else 503, content_type="application/json")
    answer.headers["Cache-Control"] = "no-store"
    return answer
