"""Authentication by API key.

There are two steps, because the rate limiter runs between them: `identify` looks up the key, `require_key` refuses
requests without a valid one. That way refused requests count towards the limit of their address.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

from flask import g, request

from shared.errors import Forbidden, Unauthorized
from web.access.api_keys import ApiKey, KeyStore

PUBLIC_BLUEPRINTS: Final = frozenset({"health", "openapi"})
"""Blueprints whose routes answer without a key, because monitors, load balancers and browsers send none. The routes
themselves decide what they show to strangers."""
_FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


def is_public_route() -> bool:
    """Whether the request needs no key. A request without a route gets 404 or 405 with or without a key."""
    return request.endpoint is None or request.blueprint in PUBLIC_BLUEPRINTS


def identify(store: KeyStore) -> None:
    """Store the request's API key in `g.key`; None if it has no valid key."""
    key = _sent_key()
    g.key = store.find(key) if key and request.endpoint is not None else None


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


def is_local() -> bool:
    """Whether the request comes from this machine directly. One that a proxy on this machine forwarded may not."""
    try:
        address = ip_address(request.remote_addr or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    forwarded = any(name in request.headers for name in _FORWARDED)
    return (mapped or address).is_loopback and not forwarded


def require_key_unless_local() -> None:
    """Refuse a request from another machine without a valid key.

    Raises:
        Unauthorized: the request has no valid key.
    """
    if g.key is None and not is_local():
        raise Unauthorized("Send a valid API key as X-API-Key or as a Bearer token, or set METRICS_PUBLIC=true.")


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
