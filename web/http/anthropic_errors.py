"""Errors in Anthropic's format, for the routes of the Messages API.

Their SDKs choose an exception by the status, and show `error.message`.
"""

from __future__ import annotations

import re
from typing import Final

from flask import Response

from shared.errors import MlxqError
from web.http.request_id import current_request_id
from web.http.retries import retry_headers
from web.schemas.problems import AnthropicError, AnthropicErrorDetails

MEDIA_TYPE: Final = "application/json"
OVERLOADED: Final = 529
"""Anthropic's status for a service that cannot accept the request at this moment."""
REQUEST_ID: Final = "request-id"
_PATHS: Final = re.compile(r"/v1/messages(?:/|$)")
_STATUSES: Final = {422: 400, 503: OVERLOADED}
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def is_expected(path: str) -> bool:
    """Whether errors of this path are in Anthropic's format."""
    return _PATHS.match(path) is not None


def status_of(status: int) -> int:
    """Return the status that Anthropic uses for one of this service."""
    return _STATUSES.get(status, status)


def error_body(error: MlxqError, request_id: str) -> AnthropicError:
    """Return the body of an error. The format has no place for the field, so the message names it."""
    status = status_of(error.status)
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    named = error.field is None or error.field in error.detail
    message = error.detail if named else f"{error.field}: {error.detail}"
    return AnthropicError(error=AnthropicErrorDetails(type=kind, message=message), request_id=request_id)


def anthropic_error(error: MlxqError) -> Response:
    """Return an error in Anthropic's format."""
    request_id = current_request_id()
    body = error_body(error, request_id).model_dump_json()
    headers = {REQUEST_ID: request_id, **retry_headers(error)}
    return Response(body, status_of(error.status), headers, content_type=MEDIA_TYPE)
