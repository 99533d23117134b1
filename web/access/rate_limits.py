"""Requests per key and time, counted in Redis; locally in each process while Redis is away."""

from __future__ import annotations

import time
from typing import Any, Final

import redis
from flask import Flask, Response, g, request
from flask_limiter import Limiter

from shared.queue.redis import connect
from shared.settings import Settings
from web.access.auth import is_open

ANONYMOUS: Final = "300/minute"
"""Requests without a valid key, by address: generous for a client that is set up wrongly, slow for guessing."""

_TIMEOUT_S: Final = 1.0
"""A limiter that waits is worse than one that counts locally."""


def register(app: Flask, settings: Settings) -> Limiter:
    """Count and limit every request that needs a key."""
    pool: Any = connect(settings.store_url, timeout_s=_TIMEOUT_S, retries=0).connection_pool
    limiter = Limiter(
        _whose,
        # An application limit counts all routes together; a default limit would count each by itself.
        application_limits=[lambda: _allowance(settings)],
        strategy="sliding-window-counter",
        storage_uri="redis://",  # the kind only: where it is, the pool knows
        storage_options={"connection_pool": pool},
        in_memory_fallback_enabled=True,
        # Of requests that find Redis gone at the same moment the first switches to local counting, and for the
        # others Flask-Limiter raises: they pass.
        swallow_errors=True,
    )
    limiter.request_filter(is_open)
    limiter.init_app(app)
    app.after_request(lambda response: _tell(limiter, response))
    return limiter


def _whose() -> str:
    return f"key:{g.key.id}" if g.key else f"address:{request.remote_addr}"


def _allowance(settings: Settings) -> str:
    return (g.key.rate_limit or settings.rate_limit) if g.key else ANONYMOUS


def _tell(limiter: Limiter, response: Response) -> Response:
    """Add the headers. Flask-Limiter's own would put Retry-After on every answer, refused or not."""
    limit = limiter.current_limit
    if limit is None:
        return response
    try:
        reset_at, remaining = limit.window
    except redis.RedisError:
        return response  # the next request counts locally
    wait_s = max(1, round(reset_at - time.time() + 0.5))
    response.headers["X-RateLimit-Limit"] = str(limit.limit.amount)
    response.headers["X-RateLimit-Remaining"] = str(remaining)
    response.headers["X-RateLimit-Reset"] = str(round(reset_at + 0.5))
    if limit.breached:
        response.headers["Retry-After"] = str(wait_s)
    return response
