"""Signing in and out. The form has a token that a cookie repeats, so that no other site can sign a browser in."""

from __future__ import annotations

import hmac
import secrets
from typing import Final
from urllib.parse import urlsplit

from flask import g, redirect, request
from werkzeug.wrappers import Response as AnyResponse

from web.access.auth import CSRF_FIELD, require_csrf_token
from web.access.sessions import COOKIE, LIFETIME_S
from web.console.layout import page_description, render, routes
from web.http.request_id import current_request_id
from web.services import services

_FORM_COOKIE: Final = "mlxq_sign_in"
_FORM_S: Final = 3600
_MAX_FORM_BYTES: Final = 16_384


@routes.get("/console/sign-in")
@page_description("Show the sign-in page")
def sign_in_page() -> AnyResponse:
    """A form for an API key."""
    if g.session is not None and g.key is not None:
        return redirect(_next())
    return _form()


@routes.post("/console/sign-in")
@page_description("Sign in to the console")
def sign_in() -> AnyResponse:
    """Begins a session. Attempts are limited by address, and take the same time for known and unknown keys."""
    request.max_content_length = _MAX_FORM_BYTES
    if not hmac.compare_digest(
        request.form.get(CSRF_FIELD, "").encode(), request.cookies.get(_FORM_COOKIE, "").encode()
    ) or not request.cookies.get(_FORM_COOKIE):
        return _form("The form is too old, or cookies are off. Try again.", 403)
    key = services().keys.find(request.form.get("key", "").strip())
    if key is None:
        return _form("The API key is unknown or revoked.", 401)
    session = services().sessions.begin(key.id)
    response = redirect(_next(), 303)
    response.set_cookie(
        COOKIE, session.token, max_age=LIFETIME_S, httponly=True, samesite="Strict", secure=request.is_secure
    )
    response.delete_cookie(_FORM_COOKIE, path="/console")
    return response


@routes.post("/console/sign-out")
@page_description("Sign out of the console")
def sign_out() -> AnyResponse:
    """Ends the session."""
    if g.session is not None:
        request.max_content_length = _MAX_FORM_BYTES
        require_csrf_token()
        services().sessions.end(g.session)
    response = redirect("/console/sign-in", 303)
    response.delete_cookie(COOKIE)
    return response


def _form(error: str = "", status: int = 200) -> AnyResponse:
    token = secrets.token_urlsafe(24)
    response = render(
        "sign_in", "", status, form_token=token, error=error, next=_next(), request_id=current_request_id()
    )
    response.set_cookie(
        _FORM_COOKIE,
        token,
        max_age=_FORM_S,
        path="/console",
        httponly=True,
        samesite="Strict",
        secure=request.is_secure,
    )
    return response


def _next() -> str:
    """Return the path of the console to go to after the sign-in. Other addresses are ignored."""
    target = request.values.get("next", "/")
    parts = urlsplit(target)
    local = not parts.scheme and not parts.netloc and "\\" not in target and not target.startswith("//")
    return target if local and (parts.path == "/" or parts.path.startswith("/console/")) else "/"
