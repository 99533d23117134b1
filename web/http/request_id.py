"""One id for a request and all that it causes: in the answer, in every log line, in the job."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from flask import request

from shared.logging import about

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ENVIRON: Final = "mlxq.request_id"
_WELL_FORMED: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Correlation:
    """WSGI middleware, because answers and streams must carry the id whatever the application does."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request. A generator, so that lines logged while a stream runs carry the id too."""
        request_id = _accepted(environ.get("HTTP_X_REQUEST_ID", ""))
        environ[ENVIRON] = request_id

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            return start_response(status, [*headers, ("X-Request-ID", request_id)], exc_info)

        with about(request_id=request_id):
            body = self._app(environ, start)
            try:
                yield from body
            finally:
                close = getattr(body, "close", None)
                if close is not None:
                    close()


def current_request_id() -> str:
    """The id of the request being served."""
    return str(request.environ.get(ENVIRON, ""))


def _accepted(sent: str) -> str:
    return sent if _WELL_FORMED.fullmatch(sent) else secrets.token_hex(16)
