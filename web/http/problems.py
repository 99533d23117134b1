"""Errors as `application/problem+json` (RFC 9457); on routes of the OpenAI and the Anthropic API in their formats.

Responses contain only what clients may know. Tracebacks and messages of libraries go to the log; the request id in the
response leads to the log line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import redis
from flask import Flask, Response, request
from flask_limiter import RateLimitExceeded
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from werkzeug.exceptions import HTTPException, NotFound

from shared import errors
from shared.errors import MlxqError
from shared.redis.client import is_denied, passes
from web.http import anthropic_errors, openai_errors
from web.http.request_id import current_request_id
from web.schemas.problems import MEDIA_TYPE, FieldError, ProblemDetails

log = logging.getLogger(__name__)

_BY_STATUS: dict[int, type[MlxqError]] = {
    kind.status: kind
    for kind in (
        errors.BadRequest,
        errors.Unauthorized,
        errors.Forbidden,
        errors.NotFound,
        errors.MethodNotAllowed,
        errors.NotAcceptable,
        errors.RequestTimeout,
        errors.Conflict,
        errors.Gone,
        errors.TooLarge,
        errors.UnsupportedMedia,
        errors.Invalid,
        errors.RateLimited,
        errors.Unavailable,
    )
}
_FIELD_DETAILS = {
    "extra_forbidden": "Unknown field. Remove it, or correct its name",
    **dict.fromkeys(("dict_type", "model_type"), "Input should be a JSON object"),
}
"""Messages in place of pydantic's, by its code."""
_DETAILS = {
    404: "There is no route with this path.",
    405: "This route does not support the method; the Allow header lists the supported ones.",
    413: "The request body is larger than this service accepts.",
}


def register(app: Flask) -> None:
    """Answer every exception with a problem document."""
    for kind in (MlxqError, ValidationError, RateLimitExceeded, HTTPException, redis.RedisError, Exception):
        app.register_error_handler(kind, answer)


def answer(error: Exception) -> Response:
    """Return the response for any exception, and log those that are no fault of the client."""
    match error:
        case MlxqError():
            return problem(error)
        case ValidationError():
            return _invalid(error)
        case RateLimitExceeded():
            return _rate_limited(error)
        case HTTPException():
            return _http(error)
        case redis.RedisError():
            return _redis(error)
        case _:
            return _internal(error)


def problem(error: MlxqError, field_errors: Sequence[FieldError] = ()) -> Response:
    """Return the response for an error."""
    if anthropic_errors.is_expected(request.path):
        response = anthropic_errors.anthropic_error(error)
    elif openai_errors.is_expected(request.path):
        response = openai_errors.openai_error(error)
    else:
        body = ProblemDetails.of(error, current_request_id(), field_errors)
        response = Response(body.model_dump_json(exclude_none=True), error.status, content_type=MEDIA_TYPE)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="mlxq"'
    return response


def invalid_fields(error: ValidationError, codes: Mapping[str, str]) -> tuple[errors.Invalid, list[FieldError]]:
    """Return the error for the first invalid field of a request, and all invalid fields.

    Args:
        codes: codes of errors in place of the general one, by pydantic's code.
    """
    field_errors = errors_of(error)
    first = field_errors[0]
    prefix = f"{first.field}: " if first.field else ""
    return errors.Invalid(prefix + first.detail, code=codes.get(first.code), field=first.field), field_errors


def _invalid(error: ValidationError) -> Response:
    openai = openai_errors.is_expected(request.path)
    return problem(*invalid_fields(error, openai_errors.CODES if openai else {}))


def errors_of(error: ValidationError) -> list[FieldError]:
    """Return the invalid fields of a body; at least one."""
    return [_field_error(each) for each in error.errors(include_url=False, include_context=False, include_input=False)]


def _field_error(error: ErrorDetails) -> FieldError:
    detail = _FIELD_DETAILS.get(error["type"], error["msg"])
    return FieldError(field=field_path(error["loc"]) or None, code=error["type"], detail=detail)


def field_path(location: Sequence[int | str]) -> str:
    """Write pydantic's location `("messages", 0, "role")` as `messages[0].role`."""
    # Names in brackets are tags of unions, or say that a name in an object is invalid; they are no part of the request.
    parts = [part for part in location if isinstance(part, int) or not part.startswith(("(", "[key]"))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".")


def _rate_limited(error: RateLimitExceeded) -> Response:
    detail = f"The rate limit of {error.description} is exceeded. Wait for the number of seconds in Retry-After."
    return problem(errors.RateLimited(detail))


def _http(error: HTTPException) -> Response:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    kind = _BY_STATUS.get(status, errors.BadRequest if status < 500 else errors.Internal)
    detail = _DETAILS.get(status, "The request cannot be served.")
    code = None
    if isinstance(error, NotFound):
        code = "route_not_found"
        detail = openai_errors.missing_route() if openai_errors.is_expected(request.path) else detail
    response = problem(kind(detail, code=code))
    if status != kind.status:
        response.status_code = status
    allowed = getattr(error, "valid_methods", None)
    if allowed:
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def _redis(error: redis.RedisError) -> Response:
    if is_denied(error):
        log.error("redis_permission_denied", extra={"path": request.path, "reason": str(error)})
        detail = "The service's Redis user lacks a permission. GET /health names it."
        return problem(errors.RedisUnsuitable(detail, retry_after=10))
    if not passes(error):  # for example a script that raises: a bug of ours
        return _internal(error)
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        log.error("redis_out_of_memory", extra={"path": request.path, "reason": str(error)})
        return problem(errors.QueueMemoryFull("The queue's memory is full. Try again later.", retry_after=10))
    log.warning("redis_unreachable", extra={"path": request.path, "reason": str(error)})
    return problem(errors.Unavailable("The queue is unavailable. Try again shortly.", retry_after=1))


def _internal(error: Exception) -> Response:
    log.error("request_failed", exc_info=error, extra={"path": request.path})
    return problem(errors.Internal("An internal error occurred. Its cause is in the log, under this request_id."))
