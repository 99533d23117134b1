"""Traces for OpenTelemetry: the connection to a collector, trace contexts, and spans with known ids.

OpenTelemetry is imported only if a collector is configured. Finished spans wait in a bounded queue, from which a thread
sends them: a slow collector may lose spans, but never delays a job.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from shared.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind

logger = logging.getLogger(__name__)

_TRACESTATE: Final = re.compile(r"[\x20-\x7e]{1,512}")
"""Longer ones may be dropped, by W3C's specification."""
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_CLOSE_S: Final = 2.0
"""Longest wait for the last spans when a process ends."""


class TraceParent(NamedTuple):
    """The trace context of a span, as in the W3C header `traceparent`.

    Attributes:
        state: the header `tracestate`, with which vendors add to a trace; empty if there is none.
    """

    trace_id: int
    span_id: int
    flags: int = 1
    state: str = ""

    @classmethod
    def of(cls, span: Span) -> Self:
        """Return the context of a span."""
        context = span.get_span_context()
        return cls(context.trace_id, context.span_id, context.trace_flags, context.trace_state.to_header())

    @classmethod
    def parse(cls, header: str, state: str = "") -> Self | None:
        """Parse the headers; None if `traceparent` is not valid, because a client's mistake must not fail its request.

        A `tracestate` that is not valid is dropped.
        """
        match = _TRACEPARENT.fullmatch(header.strip())
        if match is None or header.startswith(("ff", "00-" + "0" * 32)) or not int(match[2], 16):
            return None
        state = state if _TRACESTATE.fullmatch(state) else ""
        return cls(int(match[1], 16), int(match[2], 16), int(match[3], 16), state)

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"

    def context(self) -> SpanContext:
        """Return it as OpenTelemetry's type."""
        from opentelemetry.trace import SpanContext, TraceFlags, TraceState

        state = TraceState.from_header([self.state])  # leaves out members that are not valid
        return SpanContext(self.trace_id, self.span_id, True, TraceFlags(self.flags), state)


def span_id(*parts: object) -> int:
    """Derive the id of a span, so that any process can refer to it, or send it in place of one that died."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


class Tracer:
    """Starts spans and sends them to the collector.

    Args:
        endpoint: URL of the collector.
        headers: HTTP headers for it, as `name=value,name=value`.
        service: value of the attribute `service.name`, unless OTEL_SERVICE_NAME is set.
        instance: name of this process.
    """

    def __init__(self, endpoint: str, headers: str, service: str, instance: str) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        chosen = threading.local()

        class Ids(RandomIdGenerator):
            """Random ids, or the one that `span` has chosen for its next span."""

            def generate_span_id(self) -> int:
                given: int = chosen.__dict__.pop("span_id", 0)
                return given or super().generate_span_id()

        self._chosen = chosen
        attributes = {"service.name": service, "service.instance.id": instance}
        resource = Resource.create(attributes).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, id_generator=Ids(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_make_exporter(endpoint, headers)))
        self._tracer = self._provider.get_tracer("mlxq")

    def start(
        self,
        name: str,
        parent: TraceParent | None,
        *,
        kind: SpanKind | None = None,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[Link] = (),
        start_s: float | None = None,
        id_: int = 0,
    ) -> Span:
        """Start a span, which the caller ends.

        Args:
            parent: None for the first span of a trace.
            start_s: seconds since the epoch; default: now.
            id_: the span's id, from `span_id`; 0 for a random one.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, SpanKind, set_span_in_context

        context = Context() if parent is None else set_span_in_context(NonRecordingSpan(parent.context()), Context())
        self._chosen.span_id = id_
        return self._tracer.start_span(
            name,
            context,
            SpanKind.INTERNAL if kind is None else kind,
            {name: value for name, value in (attributes or {}).items() if value is not None},
            links,
            None if start_s is None else nanoseconds(start_s),
        )

    def close(self) -> None:
        """Send the last spans, for at most two seconds."""
        sender = threading.Thread(target=self._provider.shutdown, daemon=True)
        sender.start()
        sender.join(_CLOSE_S)


def _make_exporter(endpoint: str, headers: str) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.util.re import parse_env_headers

    class Exporter(OTLPSpanExporter):
        """Logs one line when the collector stops accepting spans, and one when it accepts them again."""

        failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = super().export(spans)
            failed = result is not SpanExportResult.SUCCESS
            if failed != self.failing:
                self.failing = failed
                logger.log(logging.WARNING if failed else logging.INFO, "traces_dropped" if failed else "traces_sent")
            return result

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it logs every retry and every span that is dropped
    url = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or f"{endpoint.rstrip('/')}/v1/traces"
    return Exporter(url, headers=parse_env_headers(headers, liberal=True) or None)


def nanoseconds(seconds: float) -> int:
    """Convert a time to OpenTelemetry's unit."""
    return round(seconds * 1e9)


def make_tracer(settings: Settings, service: str, instance: str) -> Tracer | None:
    """Return a tracer; None if there is no collector."""
    endpoint, headers = settings.otel_exporter_otlp_endpoint, settings.otel_exporter_otlp_headers.get_secret_value()
    return Tracer(endpoint, headers, service, instance) if endpoint else None
