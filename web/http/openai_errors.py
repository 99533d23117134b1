"""Errors in OpenAI's format, for routes of the OpenAI API and for paths below `/v1` that do not exist.

OpenAI's SDKs show users only `error.message`. From a problem document they show nothing but the status.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from flask import Flask, Response, current_app, request

from shared.errors import Invalid, MlxqError
from web.http.retries import retry_headers
from web.schemas.problems import OpenAIError, OpenAIErrorDetails

MEDIA_TYPE: Final = "application/json"
_OTHERS: Final = re.compile(r"/v1/(?:(?:jobs|messages|keys|overview|models/downloads)(?:/|$)|models/[^/]+/aliases$)")
CODES: Final = {"extra_forbidden": "unknown_parameter", "unsupported_parameter": "unsupported_parameter"}
"""Codes of invalid fields that clients may want to distinguish, by pydantic's code."""
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def is_expected(path: str) -> bool:
    """Whether errors of this path are in OpenAI's format."""
    return path.startswith("/v1/") and not _OTHERS.match(path)


def openai_error(error: MlxqError) -> Response:
    """Return an error in OpenAI's format."""
    status = status_of(error.status)
    return Response(error_json(error), status, retry_headers(error), content_type=MEDIA_TYPE)


def error_json(error: MlxqError) -> str:
    """Return the body of an error, which is also an event of a stream that fails."""
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    details = OpenAIErrorDetails(message=error.detail, type=kind, param=error.field, code=error.code)
    return OpenAIError(error=details).model_dump_json()


def status_of(status: int) -> int:
    """Return the status that OpenAI uses in place of a native one: invalid fields are 400."""
    return 400 if status == Invalid.status else status


def missing_route() -> str:
    """Return the message for a path that does not exist. It names the routes that do."""
    routes = ", ".join(_routes(current_app))
    return f"There is no route {request.method} {request.path[:200]}. This service has {routes}. GET /docs shows more."


def _routes(app: Flask) -> Iterator[str]:
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith("/v1/") or rule.rule == "/inference":
            methods = "/".join(sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}))
            yield f"{methods} {rule.rule.replace('<', '{').replace('>', '}')}"
