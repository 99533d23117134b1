"""`/openapi.json`, and `/docs`: Swagger UI, with all its assets served from here."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from flask import Blueprint, Response, current_app, send_from_directory

from web.http.openapi import describe

routes = Blueprint("openapi", __name__)

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mlxq API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_INITIALIZER: Final = """SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, tryItOutEnabled: true
});
"""
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@routes.get("/openapi.json")
@describe("Get the OpenAPI document", responses={200: "application/json"})
def openapi() -> Response:
    """OpenAPI 3.1, generated from the models that validate requests."""
    from web.http.openapi_document import document

    return Response(document(current_app), content_type="application/json")


@routes.get("/docs")
@describe("Show the documentation in a browser", responses={200: "text/html"}, listed=False)
def docs() -> Response:
    """Swagger UI with this document."""
    return Response(_PAGE, mimetype="text/html", headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY})


@routes.get("/docs/start.js")
@describe("Get the script that starts Swagger UI", responses={200: "text/javascript"}, listed=False)
def docs_start() -> Response:
    """A separate file, because the page's Content-Security-Policy forbids inline scripts."""
    return Response(_INITIALIZER, mimetype="text/javascript")


@routes.get("/docs/<asset>")
@describe("Get a file of Swagger UI", responses={200: "application/octet-stream"}, listed=False)
def docs_asset(asset: str) -> Response:
    """Scripts, styles and icons of the page."""
    return send_from_directory(str(files("flask_swagger_ui") / "dist"), asset, max_age=3600)
