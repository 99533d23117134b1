"""A collector of traces: receives OTLP over HTTP as OpenTelemetry's protocol defines it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as the collector sees it. Times are in seconds since the epoch, ids in hexadecimal."""

    name: str
    service: str
    trace_id: str
    id: str
    parent: str
    start: float
    end: float
    attributes: dict[str, Any]
    links: tuple[str, ...]
    failed: bool
    events: tuple[str, ...]
    state: str


class Collector:
    """An HTTP server that records the spans that it receives.

    Attributes:
        bodies: the bodies of all requests.
        headers: the headers of the last request.
        hanging: while set, requests get no answer.
        status: of the answers. With an error, nothing is recorded.
    """

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.bodies: list[bytes] = []
        self.headers: dict[str, str] = {}
        self.hanging = threading.Event()
        self.status = 200
        self._released = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if collector.hanging.is_set():
                    collector._released.wait(60)
                    return
                if collector.status == 200:
                    collector.headers = {name.lower(): value for name, value in self.headers.items()}
                    collector.bodies.append(body)
                    collector.spans += _spans(body)
                self.send_response(collector.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """Return the spans of a trace in the order of their start, longer ones first."""
        found = [span for span in self.spans if span.trace_id == trace_id]
        return sorted(found, key=lambda span: (span.start, -span.end))


def _spans(body: bytes) -> list[ReceivedSpan]:
    request = ExportTraceServiceRequest.FromString(body)
    found = []
    for of_resource in request.resource_spans:
        resource = {each.key: _value(each.value) for each in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            found += [_span(span, resource["service.name"]) for span in of_scope.spans]
    return found


def _span(span: Span, service: str) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        service=service,
        trace_id=span.trace_id.hex(),
        state=span.trace_state,
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes={each.key: _value(each.value) for each in span.attributes},
        links=tuple(link.span_id.hex() for link in span.links),
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        events=tuple(event.name for event in span.events),
    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
