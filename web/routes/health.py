"""`/health`, the probes `/livez` and `/readyz`, and `/metrics` for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, request
from pydantic import BaseModel

from web.http.openapi import describe
from web.schemas.health import HealthView, ProbeView
from web.services import services

routes = Blueprint("health", __name__)


@routes.get("/health")
@describe("Get the health of the service", responses={200: HealthView, 503: HealthView})
def health() -> Response:
    """The state of Redis, of every worker and of the queues. The status is 503 if no job can run now."""
    view = services().health_checker.check()
    return _response(view, ok=view.status != "down")


@routes.get("/livez")
@describe("Check that the API process is alive", responses={200: ProbeView})
def livez() -> Response:
    """Does not check Redis or the workers: restarting the API process would not help them."""
    return _response(ProbeView(status="ok"), ok=True)


@routes.get("/readyz")
@describe("Check that jobs can run", responses={200: ProbeView, 503: ProbeView})
def readyz() -> Response:
    """200 if Redis responds and a worker is ready or can load a model on demand."""
    ready = services().health_checker.ready()
    return _response(ProbeView(status="ok" if ready else "unavailable"), ok=ready)


@routes.get("/metrics")
@describe("Get metrics for Prometheus", responses={200: "text/plain"})
def metrics() -> Response:
    """Metrics of all API processes, the queues and the workers."""
    page, content_type = services().metrics.page(request.headers.get("Accept", ""))
    return Response(page, content_type=content_type)


def _response(view: BaseModel, *, ok: bool) -> Response:
    response = Response(view.model_dump_json(), 200 if ok else 503, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response
