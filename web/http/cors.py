"""Cross-origin requests: pages of the configured origins may call the API from a browser."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from flask import Flask, Response, request

_ANY: Final = "*"
_METHODS: Final = "GET, POST, PUT, PATCH, DELETE, OPTIONS"
_EXPOSED: Final = (
    "X-Request-ID, Request-ID, Location, Retry-After, X-Should-Retry, Idempotency-Replayed, Preference-Applied, "
    "X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, RateLimit, RateLimit-Policy"
)
"""Headers of responses that scripts may read."""
_MAX_AGE_S: Final = 7200
"""How long a browser may remember a preflight; browsers limit it further."""


def register(app: Flask, origins: str) -> None:
    """Allow the given origins, separated by commas, or all with `*`; with an empty string, none.

    Preflight requests are answered before authentication, because browsers send them without credentials.
    """
    allowed = frozenset(filter(None, (origin.strip().rstrip("/") for origin in origins.split(","))))
    if not allowed:
        return

    def preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        response = Response(status=HTTPStatus.NO_CONTENT)
        response.headers["Access-Control-Allow-Methods"] = _METHODS
        response.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "")
        response.headers["Access-Control-Max-Age"] = str(_MAX_AGE_S)
        return response

    def allow(response: Response) -> Response:
        origin = request.headers.get("Origin", "")
        response.vary.add("Origin")
        if origin and (_ANY in allowed or origin in allowed):
            response.headers["Access-Control-Allow-Origin"] = _ANY if _ANY in allowed else origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        return response

    app.before_request(preflight)
    app.after_request(allow)
