"""What all pages have: the frame, the headers, and the session."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from flask import Blueprint, Response, g, make_response, redirect, render_template, request
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response as AnyResponse

from shared import VERSION
from web.access.auth import CONSOLE, caller, is_admin
from web.console import formats
from web.http.openapi import describe

STATIC: Final = Path(__file__).parent / "static"
THEMES: Final = ("auto", "light", "dark")
THEME_COOKIE: Final = "mlxq_theme"
NAVIGATION: Final = (
    ("overview", "/", "Overview"),
    ("jobs", "/console/jobs", "Jobs"),
    ("playground", "/console/playground", "Playground"),
    ("models", "/console/models", "Models"),
    ("batches", "/console/batches", "Batches"),
    ("webhooks", "/console/webhooks", "Webhooks"),
    ("keys", "/console/keys", "Keys"),
    ("usage", "/console/usage", "Usage"),
)
"""Name, path and title of each page."""
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Vary": "Accept, Cookie",
}

routes = Blueprint(CONSOLE, __name__, template_folder="templates")
page_description = partial(describe, responses={200: "text/html"}, listed=False)
"""Describes a view function of the console, which is no part of the API."""


def page(view: Callable[..., AnyResponse]) -> Callable[..., AnyResponse]:
    """Show a page only to a signed-in browser; redirect others to the sign-in page."""

    @wraps(view)
    def show(*args: Any, **kwargs: Any) -> AnyResponse:
        if request.path == "/" and not accepts_html():
            raise NotFound  # clients of the API get the same answer as for other paths without a route
        if g.session is None or g.key is None:
            query = "" if request.path == "/" else "?" + urlencode({"next": request.full_path.rstrip("?")})
            return redirect("/console/sign-in" + query)
        return view(*args, **kwargs)

    return show


def accepts_html() -> bool:
    """Whether the client asks for HTML by name, as browsers do; `*/*` is not enough."""
    return any(kind in ("text/html", "application/xhtml+xml") for kind, _ in request.accept_mimetypes)


def render(template: str, active: str, status: int = 200, **context: Any) -> Response:
    """Return a page of the console.

    Args:
        active: name of the page in the navigation.
    """
    signed_in = g.get("session") is not None and g.get("key") is not None
    body = render_template(
        f"console/{template}.html",
        active=active,
        navigation=NAVIGATION if signed_in else (),
        csrf_token=g.session.csrf_token if signed_in else "",
        key=caller() if signed_in else None,
        admin=signed_in and is_admin(),
        theme=request.cookies.get(THEME_COOKIE) if request.cookies.get(THEME_COOKIE) in THEMES else "auto",
        asset=asset,
        version=VERSION,
        **formats.FILTERS,
        **context,
    )
    return with_headers(make_response(body, status))


def with_headers(response: Response) -> Response:
    """Add the headers of pages."""
    response.headers.update(_HEADERS)
    return response


@cache
def static_version() -> str:
    """Return a hash of all static files: their addresses change with it, so browsers may cache them forever."""
    files = sorted(path for path in STATIC.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def asset(name: str) -> str:
    """Return the address of a static file."""
    return f"/console/static/{static_version()}/{name}"
