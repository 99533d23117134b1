"""`/health`, the probes `/livez` and `/readyz`, and `/metrics` for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, g, request
from pydantic import BaseModel

from web.access.auth import require_key_unless_local
from web.http.openapi import describe
from web.schemas.health import HealthAnswer, HealthSummary, ProbeView
from web.services import services

routes = Blueprint("health", __name__)


@routes.get("/health")
@describe("Get the health of the service", responses={200: HealthAnswer, 503: HealthAnswer})
def health() -> Response:
    """With a valid API key: the state of Redis, of every worker and of the queues. Without one: only a summary.

    The status is 503 if no job can run now.
    """
    view = services().health_checker.check()
    shown = view if g.key else HealthSummary(status=view.status, models=view.models)
    return _response(shown, ok=view.status != "down")


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
@describe("Get metrics for Prometheus", responses={200: "text/plain"}, errors=(401,))
def metrics() -> Response:
    """Metrics of all API processes, the queues and the workers.

    Needs an API key, unless the request comes from the machine of the API or `METRICS_PUBLIC` is set.
    """
    if not services().settings.metrics_public:
        require_key_unless_local()
    page, content_type = services().metrics.page(request.headers.get("Accept", ""))
    return Response(page, content_type=content_type)


def _response(view: BaseModel, *, ok: bool) -> Response:
    response = Response(view.model_dump_json(), 200 if ok else 503, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response
