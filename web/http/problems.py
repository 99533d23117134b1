"""Every error as `application/problem+json` (RFC 9457): what may be said, and nothing else.

A traceback or a library's message goes to the log; the request id in the answer leads to the line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus

import redis
from flask import Flask, Response, request
from flask_limiter import RateLimitExceeded
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from werkzeug.exceptions import HTTPException, NotFound

from shared import errors
from shared.errors import MlxqError
from shared.queue.redis import passes
from web.http.request_id import current_request_id
from web.schemas.problems import Fault, ProblemDetails

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

_BY_STATUS: dict[int, type[MlxqError]] = {
    kind.status: kind
    for kind in (
        errors.BadRequest,
        errors.Unauthorized,
        errors.Forbidden,
        errors.NotFound,
        errors.MethodNotAllowed,
        errors.NotAcceptable,
        errors.Conflict,
        errors.Gone,
        errors.TooLarge,
        errors.UnsupportedMedia,
        errors.Invalid,
        errors.RateLimited,
        errors.Unavailable,
    )
}
_DETAILS = {
    404: "There is nothing at this address.",
    405: "The address exists, but not for this method.",
    413: "The body is larger than this service accepts.",
}


def register(app: Flask) -> None:
    """Answer every exception of a request as a problem."""
    app.register_error_handler(MlxqError, problem)
    app.register_error_handler(ValidationError, _invalid)
    app.register_error_handler(RateLimitExceeded, _rate_limited)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(redis.RedisError, _redis)
    app.register_error_handler(Exception, _internal)


def problem(error: MlxqError, faults: Sequence[Fault] = ()) -> Response:
    """The answer that tells an error."""
    body = ProblemDetails(
        type=f"urn:mlxq:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        field=error.field,
        errors=list(faults) or None,
        request_id=current_request_id(),
    )
    answer = Response(body.model_dump_json(exclude_none=True), error.status, content_type=MEDIA_TYPE)
    if error.retry_after is not None:
        answer.headers["Retry-After"] = str(max(1, round(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        answer.headers["WWW-Authenticate"] = 'Bearer realm="mlxq"'
    return answer


def _invalid(error: ValidationError) -> Response:
    faults = [_fault(each) for each in error.errors(include_url=False, include_context=False, include_input=False)]
    first = faults[0]
    where = f"{first.field}: " if first.field else ""
    return problem(errors.Invalid(where + first.detail, field=first.field), faults)


def _fault(error: ErrorDetails) -> Fault:
    return Fault(field=_path(error["loc"]) or None, code=error["type"], detail=error["msg"])


def _path(parts: Sequence[int | str]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    named = [part for part in parts if isinstance(part, int) or not part.startswith("(")]  # which kind it was taken for
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named)
    return path.removeprefix(".")


def _rate_limited(error: RateLimitExceeded) -> Response:
    return problem(errors.RateLimited(f"More requests than {error.description} are not allowed."))


def _http(error: HTTPException) -> Response:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    kind = _BY_STATUS.get(status, errors.BadRequest if status < 500 else errors.Internal)
    detail = _DETAILS.get(status, "The request cannot be served.")
    code = "route_not_found" if isinstance(error, NotFound) else None
    answer = problem(kind(detail, code=code))
    answer.status_code = status
    allowed = getattr(error, "valid_methods", None)
    if allowed:
        answer.headers["Allow"] = ", ".join(sorted(allowed))
    return answer


def _redis(error: redis.RedisError) -> Response:
    if not passes(error):  # a script that raises, say: a fault of ours
        return _internal(error)
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        log.error("redis_out_of_memory", extra={"path": request.path, "reason": str(error)})
        return problem(errors.QueueMemoryFull("The queue's memory is full. Try again later.", retry_after=10))
    log.warning("redis_away", extra={"path": request.path, "reason": str(error)})
    return problem(errors.Unavailable("The queue cannot be reached at the moment.", retry_after=1))


def _internal(error: Exception) -> Response:
    log.error("request_failed", exc_info=error, extra={"path": request.path})
    return problem(errors.Internal("Something went wrong here. The request id leads to the cause."))
