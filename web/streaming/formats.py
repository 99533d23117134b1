"""A stream of events as bytes: Server-Sent Events, or JSON lines.

An event's data is the JSON text the worker wrote: it is passed on, not parsed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from werkzeug.datastructures import MIMEAccept

from shared.errors import NotAcceptable
from shared.jobs.log import Event

_RETRY_MS: Final = 1000


class Format(Protocol):
    """How events are written."""

    media_type: str
    opening: bytes
    heartbeat: bytes

    def farewell(self, where: str) -> bytes:
        """Said before a stream ends although its job has not; `where` it goes on."""
        ...

    def events(self, events: Iterable[Event]) -> bytes:
        """Events whose data is JSON on one line."""
        ...


class EventStream:
    """`text/event-stream`, as browsers' EventSource reads it."""

    media_type = "text/event-stream"
    opening = f"retry: {_RETRY_MS}\n\n".encode()
    heartbeat = b": heartbeat\n\n"

    def farewell(self, where: str) -> bytes:
        """A reconnection time, and a comment for whoever reads along."""
        return f"retry: {_RETRY_MS}\n: the job goes on, reconnect to {where} with Last-Event-ID\n\n".encode()

    def events(self, events: Iterable[Event]) -> bytes:
        """`id`, `event` and `data`."""
        return "".join([f"id: {n}\nevent: {kind}\ndata: {data}\n\n" for n, kind, data, _ in events]).encode()


class JsonLines:
    """`application/x-ndjson`: the same events, one JSON object a line."""

    media_type = "application/x-ndjson"
    opening = b""
    heartbeat = b'{"event":"heartbeat"}\n'

    def farewell(self, where: str) -> bytes:
        """An event without a number."""
        return f'{{"event":"reconnect","stream":"{where}"}}\n'.encode()

    def events(self, events: Iterable[Event]) -> bytes:
        """`id`, `event` and `data` as members."""
        return "".join([f'{{"id":{n},"event":"{kind}","data":{data}}}\n' for n, kind, data, _ in events]).encode()


FORMATS: Final[dict[str, Format]] = {each.media_type: each for each in (EventStream(), JsonLines())}


def negotiate(accept: MIMEAccept) -> Format:
    """The format that fits an Accept header best; Server-Sent Events when all do.

    Raises:
        NotAcceptable: none fits.
    """
    best = accept.best_match(list(FORMATS), default="") if accept.provided else EventStream.media_type
    if not best:
        raise NotAcceptable(f"A stream is sent as {' or '.join(FORMATS)}.", field="Accept")
    return FORMATS[best]
