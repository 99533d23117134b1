"""Wire formats of event streams: Server-Sent Events and NDJSON.

The data of an event is JSON text that the worker wrote. It is copied without parsing it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from werkzeug.datastructures import MIMEAccept

from shared.errors import NotAcceptable
from shared.jobs.log import Event

_RETRY_MS: Final = 1000
"""Reconnection time that clients of Server-Sent Events are told."""


class Format(Protocol):
    """A wire format."""

    media_type: str
    opening: bytes
    """Sent first."""
    heartbeat: bytes
    """Sent while there are no events."""

    def reconnect_hint(self, stream_path: str) -> bytes:
        """Return the end of a stream whose job has not ended; the client can continue at `stream_path`."""
        ...

    def events(self, events: Iterable[Event]) -> bytes:
        """Encode events. Their data must be JSON on one line."""
        ...


class EventStream:
    """`text/event-stream`, as the EventSource of browsers reads it."""

    media_type = "text/event-stream"
    opening = f"retry: {_RETRY_MS}\n\n".encode()
    heartbeat = b": heartbeat\n\n"

    def reconnect_hint(self, stream_path: str) -> bytes:
        """Return a reconnection time, which EventSource obeys, and a comment for people."""
        return f"retry: {_RETRY_MS}\n: the job continues; reconnect to {stream_path} with Last-Event-ID\n\n".encode()

    def events(self, events: Iterable[Event]) -> bytes:
        """Encode each event as the fields `id`, `event` and `data`."""
        return "".join([f"id: {n}\nevent: {kind}\ndata: {data}\n\n" for n, kind, data, _ in events]).encode()


class JsonLines:
    """`application/x-ndjson`: one JSON object per line."""

    media_type = "application/x-ndjson"
    opening = b""
    heartbeat = b'{"event":"heartbeat"}\n'

    def reconnect_hint(self, stream_path: str) -> bytes:
        """Return an event without a number."""
        return f'{{"event":"reconnect","stream":"{stream_path}"}}\n'.encode()

    def events(self, events: Iterable[Event]) -> bytes:
        """Encode each event as an object with `id`, `event` and `data`."""
        return "".join([f'{{"id":{n},"event":"{kind}","data":{data}}}\n' for n, kind, data, _ in events]).encode()


FORMATS: Final[dict[str, Format]] = {each.media_type: each for each in (EventStream(), JsonLines())}


def negotiate(accept: MIMEAccept) -> Format:
    """Return the format that an Accept header prefers; Server-Sent Events if it has no preference.

    Raises:
        NotAcceptable: the header accepts neither format.
    """
    best = accept.best_match(list(FORMATS), default="") if accept.provided else EventStream.media_type
    if not best:
        raise NotAcceptable(f"A stream can be sent as {' or '.join(FORMATS)}.", field="Accept")
    return FORMATS[best]
