"""`/metrics` for Prometheus."""

from __future__ import annotations

from flask import Blueprint, Response, request

from web.apidoc import describe
from web.services import services

routes = Blueprint("metrics", __name__)


@routes.get("/metrics")
@describe("Metrics for Prometheus", answers={200: "text/plain"})
def metrics() -> Response:
    """Of all API processes, the queues and the workers."""
    page, content_type = services().metrics.page(request.headers.get("Accept", ""))
    return Response(page, content_type=content_type)
