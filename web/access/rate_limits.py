"""Rate limits per API key, counted in Redis; while Redis is unavailable, each process counts for itself.

Each key has two limits: one for requests that only read (GET), such as polls and streams, and one for all others. A
client that follows its jobs must not use up the requests that it has for new ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeAlias

import redis
from flask import Flask, Response, g, request
from flask_limiter import Limiter
from limits import parse_many

from shared.jobs.limits import TokensLeft
from shared.redis.client import connect
from shared.settings import Settings
from web.access.auth import PUBLIC_BLUEPRINTS

ANONYMOUS_LIMIT: Final = "300/minute"
"""Limit per address for requests without a valid key: enough for a misconfigured client, too slow to guess keys."""
SIGN_IN_LIMIT: Final = "10/minute"
"""Limit per address for attempts to sign in to the console."""
SIGN_IN: Final = "console.sign_in"
"""Endpoint of these attempts."""

_READS: Final = frozenset({"GET", "HEAD"})
_NO_ROUTE: Final = "no_route"
"""Flask-Limiter ignores requests without a name."""
MINUTE_S: Final = 60
DAY_S: Final = 86400
_TIMEOUT_S: Final = 1.0
"""Timeout of calls to Redis: counting locally is better than waiting."""


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit and what is left of it.

    Attributes:
        name: `requests`, `reads`, `tokens` or `tokens-day`.
        window_s: the period for which the limit holds.
        reset_s: seconds until the whole limit is available again.
    """

    name: str
    limit: int
    remaining: int
    window_s: int
    reset_s: float


def _token_quotas(tokens: TokensLeft | None) -> list[Quota]:
    """Return the token limits of an API key."""
    if tokens is None:
        return []
    quotas = []
    if tokens.minute_limit is not None:
        quotas.append(Quota("tokens", tokens.minute_limit, tokens.minute_left or 0, MINUTE_S, tokens.minute_reset_s))
    if tokens.day_limit is not None:
        quotas.append(Quota("tokens-day", tokens.day_limit, tokens.day_left or 0, DAY_S, tokens.day_reset_s))
    return quotas


Report: TypeAlias = Callable[[Response, Sequence[Quota]], None]
"""Adds the headers that report limits."""


def register(app: Flask, settings: Settings, report: Report) -> Limiter:
    """Count and limit all requests that need a key, and those to routes that do not exist, by address."""
    app.config["RATELIMIT_REQUEST_IDENTIFIER"] = lambda: request.endpoint or _NO_ROUTE
    pool: Any = connect(settings.store_url, timeout_s=_TIMEOUT_S, retries=0).connection_pool
    limiter = Limiter(
        _limit_key,
        # An application limit counts all routes together; a default limit would count each route separately.
        application_limits=[lambda: _current_limit(settings)],
        strategy="sliding-window-counter",
        storage_uri="redis://",  # selects the storage class; the pool has the address
        storage_options={"connection_pool": pool},
        in_memory_fallback_enabled=True,
        # When Redis goes away, the first failing request switches to local counting. Flask-Limiter raises for others
        # that fail at the same moment; they pass uncounted.
        swallow_errors=True,
    )
    limiter.request_filter(lambda: request.blueprint in PUBLIC_BLUEPRINTS)
    limiter.init_app(app)
    app.after_request(lambda response: _add_headers(limiter, response, report))
    return limiter


def _limit_key() -> str:
    if request.endpoint == SIGN_IN:
        return f"sign-in:{request.remote_addr}"
    if g.key is None:
        return f"address:{request.remote_addr}"
    return f"reads:{g.key.id}" if request.method in _READS else f"key:{g.key.id}"


def _current_limit(settings: Settings) -> str:
    if request.endpoint == SIGN_IN:
        return SIGN_IN_LIMIT
    if g.key is None:
        return ANONYMOUS_LIMIT
    limit = g.key.rate_limit or settings.rate_limit
    return max(settings.read_rate_limit, limit, key=_per_second) if request.method in _READS else limit


@cache
def _per_second(limit: str) -> float:
    return min(item.amount / item.get_expiry() for item in parse_many(limit))


def report_tokens(tokens: TokensLeft | None) -> None:
    """Report in the response's headers what is left of the caller's token limits."""
    g.tokens_left = tokens


def _add_headers(limiter: Limiter, response: Response, report: Report) -> Response:
    """Add the headers that report limits. Flask-Limiter's own would add Retry-After to all responses."""
    quotas = _token_quotas(g.get("tokens_left"))
    limit, now = limiter.current_limit, time.time()
    if limit is not None:
        try:
            reset_at, remaining = limit.window
        except redis.RedisError:
            return response  # the next request counts locally
        response.headers["X-RateLimit-Limit"] = str(limit.limit.amount)
        response.headers["X-RateLimit-Remaining"] = str(remaining)
        response.headers["X-RateLimit-Reset"] = str(round(reset_at + 0.5))
        reset_s = max(0.0, reset_at - now)
        if limit.breached:
            response.headers["Retry-After"] = str(max(1, round(reset_s + 0.5)))
        name = "reads" if request.method in _READS else "requests"
        quotas.insert(0, Quota(name, limit.limit.amount, remaining, limit.limit.get_expiry(), reset_s))
    report(response, quotas)
    return response
