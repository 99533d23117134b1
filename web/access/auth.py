"""Who is asking: API keys on requests.

Two steps, because the rate limiter stands between them: `identify` looks the key up, `require_key` refuses. So
requests without a valid key are counted as well, by address.
"""

from __future__ import annotations

from typing import Final

from flask import g, request

from shared.errors import Forbidden, Unauthorized
from web.access.api_keys import ApiKey, KeyStore

OPEN: Final = frozenset({"health", "metrics", "openapi"})
"""Blueprints that need no key: they hold no secrets, and monitors, balancers and browsers send none."""


def is_open() -> bool:
    """Whether the request needs no key. One without a route ends as 404 or 405, whoever sent it."""
    return request.endpoint is None or request.blueprint in OPEN


def identify(store: KeyStore) -> None:
    """Note the key of the request, if it has a valid one."""
    key = _presented()
    g.key = store.find(key) if key and not is_open() else None


def require_key() -> None:
    """Refuse a request that needs a key and has none.

    Raises:
        Unauthorized: no key, or not one of ours.
        Forbidden: the key may not run jobs.
    """
    if is_open():
        return
    if g.key is None:
        reason = "The API key is not valid." if _presented() else "Send an API key as X-API-Key or Bearer token."
        raise Unauthorized(reason)
    require_scope("infer")


def require_scope(scope: str) -> None:
    """Refuse a key without the scope; `admin` includes every other.

    Raises:
        Forbidden: it lacks it.
    """
    if not caller().scopes & {scope, "admin"}:
        raise Forbidden(f"This API key lacks the scope {scope!r}.")


def caller() -> ApiKey:
    """The key of the request; its id owns the jobs."""
    key: ApiKey = g.key
    return key


def _presented() -> str:
    bearer = request.authorization
    token = bearer.token if bearer is not None and bearer.type == "bearer" else None
    return request.headers.get("X-API-Key") or token or ""
