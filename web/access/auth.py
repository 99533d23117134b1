"""Authentication by API key.

There are two steps, because the rate limiter runs between them: `identify` looks up the key, `require_key` refuses
requests without a valid one. That way refused requests count towards the limit of their address.
"""

from __future__ import annotations

from typing import Final

from flask import g, request

from shared.errors import Forbidden, Unauthorized
from web.access.api_keys import ApiKey, KeyStore

PUBLIC_BLUEPRINTS: Final = frozenset({"health", "openapi"})
"""Blueprints that need no key: they reveal no secrets, and monitors, load balancers and browsers send no key."""


def is_public_route() -> bool:
    """Whether the request needs no key. A request without a route gets 404 or 405 with or without a key."""
    return request.endpoint is None or request.blueprint in PUBLIC_BLUEPRINTS


def identify(store: KeyStore) -> None:
    """Store the request's API key in `g.key`; None if it has no valid key."""
    key = _sent_key()
    g.key = store.find(key) if key and not is_public_route() else None


def require_key() -> None:
    """Refuse a request that needs a key and has no valid one.

    Raises:
        Unauthorized: the request has no key, or an unknown or revoked one.
        Forbidden: the key does not have the scope `infer`.
    """
    if is_public_route():
        return
    if g.key is None:
        raise Unauthorized(
            "The API key is unknown or revoked."
            if _sent_key()
            else "No API key was sent. Send one as X-API-Key or as a Bearer token."
        )
    require_scope("infer")


def require_scope(scope: str) -> None:
    """Refuse a key without the scope. The scope `admin` includes all others.

    Raises:
        Forbidden: the key does not have the scope.
    """
    if not caller().scopes & {scope, "admin"}:
        raise Forbidden(f"This API key does not have the scope {scope!r}.")


def caller() -> ApiKey:
    """Return the API key of the request. Its id owns the jobs that the request creates."""
    key: ApiKey = g.key
    return key


def _sent_key() -> str:
    authorization = request.authorization
    token = authorization.token if authorization is not None and authorization.type == "bearer" else None
    return request.headers.get("X-API-Key") or token or ""
