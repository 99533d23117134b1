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
from web.access.sessions import COOKIE, Session, Sessions

PUBLIC_BLUEPRINTS: Final = frozenset({"health", "openapi"})
"""Blueprints whose routes answer without a key, because monitors, load balancers and browsers send none. The routes
themselves decide what they show without a key."""
CONSOLE: Final = "console"
"""The blueprint of the console, whose pages redirect to the sign-in page."""
CSRF_HEADER: Final = "X-CSRF-Token"
CSRF_FIELD: Final = "csrf_token"
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


def is_public_route() -> bool:
    """Whether the request needs no key. A request without a route gets 404 or 405 with or without a key."""
    return request.endpoint is None or request.blueprint in PUBLIC_BLUEPRINTS


def identify(store: KeyStore, sessions: Sessions) -> None:
    """Store the request's API key in `g.key`; None if it has no valid key.

    A request without a key may have the cookie of a console session instead, which is then in `g.session`.
    """
    key, token = _sent_key(), request.cookies.get(COOKIE, "")
    g.key, g.session = None, None
    if request.endpoint is None:
        return
    if key:
        g.key = store.find(key)
    elif token and (session := sessions.find(token)) is not None:
        g.session, g.key = session, store.get(session.key_id)


def require_key() -> None:
    """Refuse a request that needs a key and has no valid one.

    Raises:
        Unauthorized: the request has no key, or an unknown or revoked one.
        Forbidden: the key does not have the scope `infer`, or the request of a session lacks its CSRF token.
    """
    if is_public_route() or request.blueprint == CONSOLE:
        return
    if g.key is None:
        raise Unauthorized(
            "The API key is unknown or revoked."
            if _sent_key()
            else "No API key was sent. Send one as X-API-Key or as a Bearer token."
        )
    require_scope("infer")
    require_csrf_token()


def require_csrf_token() -> None:
    """Refuse an unsafe request that a console session authenticates and that does not have the session's CSRF token.

    Raises:
        Forbidden: the token is missing or wrong.
    """
    session: Session | None = g.session
    if session is None or request.method in _SAFE:
        return
    # Only the console's own forms are read here: bodies of other requests may be large.
    form_token = request.form.get(CSRF_FIELD, "") if request.blueprint == CONSOLE else ""
    if not session.accepts(request.headers.get(CSRF_HEADER) or form_token):
        raise Forbidden("The CSRF token is missing or belongs to another session. Reload the page.", code="csrf_token")


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


def is_admin() -> bool:
    """Whether the API key of the request has the scope `admin`."""
    return "admin" in caller().scopes


def visible_owner() -> str | None:
    """Return whose jobs the request may see and change: those of its API key; None for all, with the scope `admin`."""
    return None if is_admin() else caller().id


def _sent_key() -> str:
    authorization = request.authorization
    token = authorization.token if authorization is not None and authorization.type == "bearer" else None
    return request.headers.get("X-API-Key") or token or ""
