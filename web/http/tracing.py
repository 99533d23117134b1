"""Spans of HTTP requests, for OpenTelemetry, which is imported only if a collector is configured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, Response, request

from shared.tracing import TraceParent, Tracer
from web.http.environ import JOB_ID, KEY_ID, QUEUE_POSITION, until_closed
from web.http.request_id import ENVIRON_KEY as REQUEST_ID

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from opentelemetry.trace import Span

TRACEPARENT: Final = "mlxq.traceparent"
TRACESTATE: Final = "mlxq.tracestate"
"""Entries of the WSGI environment: the trace context of the request's span, for the job that it creates."""
_ROUTE: Final = "mlxq.route"
_ATTRIBUTES: Final = {
    "mlxq.request_id": REQUEST_ID,
    "mlxq.key_id": KEY_ID,
    "gen_ai.response.id": JOB_ID,
    "mlxq.queue_position": QUEUE_POSITION,
}
"""Attributes of a span, and the entries of the environment that have their values."""
_UNTRACED: Final = frozenset({"/health", "/livez", "/readyz", "/metrics"})
"""Paths that monitors poll."""


class TraceMiddleware:
    """WSGI middleware that traces requests. The span of a stream ends with the stream.

    The headers `traceparent` and `tracestate` of a request make its span part of the client's trace; the response has
    those of the request's span.
    """

    def __init__(self, app: WSGIApplication, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request."""
        if environ.get("PATH_INFO", "") in _UNTRACED:
            return self._app(environ, start_response)
        return self._traced(environ, start_response)

    def _traced(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        span = self._start(environ)
        context = TraceParent.of(span)
        environ[TRACEPARENT], environ[TRACESTATE] = str(context), context.state
        headers_of_span = [("traceparent", str(context)), *([("tracestate", context.state)] if context.state else ())]
        status = 500

        def start(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal status
            status = int(line.split(maxsplit=1)[0])
            return start_response(line, [*headers, *headers_of_span], exc_info)

        try:
            yield from until_closed(self._app(environ, start))
        finally:
            _end(span, environ, status)

    def _start(self, environ: WSGIEnvironment) -> Span:
        from opentelemetry.trace import SpanKind

        method = environ["REQUEST_METHOD"]
        attributes = {
            "http.request.method": method,
            "url.path": environ.get("PATH_INFO", ""),
            "url.scheme": environ.get("wsgi.url_scheme"),
            "user_agent.original": environ.get("HTTP_USER_AGENT"),
        }
        parent = TraceParent.parse(environ.get("HTTP_TRACEPARENT", ""), environ.get("HTTP_TRACESTATE", ""))
        return self._tracer.start(method, parent, kind=SpanKind.SERVER, attributes=attributes)


def _end(span: Span, environ: WSGIEnvironment, status: int) -> None:
    from opentelemetry.trace import StatusCode

    if route := environ.get(_ROUTE):
        span.update_name(f"{environ['REQUEST_METHOD']} {route}")
        span.set_attribute("http.route", route)
    for name, entry in _ATTRIBUTES.items():
        if environ.get(entry):
            span.set_attribute(name, environ[entry])
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)
    span.end()


def register(app: Flask, tracer: Tracer) -> None:
    """Trace the application's requests."""
    app.wsgi_app = TraceMiddleware(app.wsgi_app, tracer)  # type: ignore[method-assign]
    app.after_request(_note_route)


def _note_route(response: Response) -> Response:
    if request.url_rule is not None:
        request.environ[_ROUTE] = request.url_rule.rule
    return response
