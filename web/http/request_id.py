"""Request ids: the same id appears in the response, in every log line of the request and in the job it creates."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from flask import request

from shared.logging import log_context
from web.http.environ import until_closed

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ENVIRON_KEY: Final = "mlxq.request_id"
_VALID_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIdMiddleware:
    """WSGI middleware that assigns request ids.

    A Flask hook would not be enough: error responses and log lines of running streams must carry the id too.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request. This is a generator, so the logging context lasts until a stream has ended."""
        request_id = _client_id_or_new(environ.get("HTTP_X_REQUEST_ID", ""))
        environ[ENVIRON_KEY] = request_id

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            return start_response(status, [*headers, ("X-Request-ID", request_id)], exc_info)

        with log_context(request_id=request_id):
            yield from until_closed(self._app(environ, start))


def current_request_id() -> str:
    """Return the id of the request that is being served."""
    return str(request.environ.get(ENVIRON_KEY, ""))


def _client_id_or_new(header: str) -> str:
    return header if _VALID_ID.fullmatch(header) else new_request_id()


def new_request_id() -> str:
    """Generate an id for a request that has none."""
    return secrets.token_hex(16)
