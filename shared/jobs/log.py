"""A job's log: what its readers see, and what a new attempt continues from.

Events are numbered from 1 without gaps; event n is entry `n-0` of a Redis Stream, and a copy goes to the job's
channel the moment it is written. Channels may lose messages, the log does not: `web.streaming.hub` reads the one and
falls back to the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from shared.errors import Gone
from shared.queue import keys
from shared.queue.redis import Redis


class EventKind(StrEnum):
    """The kind of an event. A newer process may write kinds that are not here: readers count them and pass them on."""

    QUEUED = "queued"
    """The job waits; data has the `reason`: `accepted`, or how its last attempt ended: `worker_lost`, `handed_back`."""
    STARTED = "started"
    """The first attempt began; data has its number, `attempt`."""
    RESUMED = "resumed"
    """A further attempt continues where the last one was cut; data has its number, `attempt`."""
    CHUNK = "chunk"
    """Text; data is `{"text": "…"}`."""
    DONE = "done"
    """The job ended; always the last event, and there is one only. Data has the `status`."""


_KINDS: dict[str, str] = {kind.value: kind for kind in EventKind}


def event_kind(name: str) -> str:
    """The `EventKind` of that name; the name itself when this version does not know it."""
    return _KINDS.get(name, name)


class Event(NamedTuple):
    """One event. `data` is a JSON object, kept as text because most readers only pass it on.

    `kind` is an `EventKind`, or the name of a kind that this version does not know.
    """

    n: int
    kind: str
    data: str
    tokens: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The text of a chunk; empty for other kinds."""
        return str(json.loads(self.data).get("text", "")) if self.kind is EventKind.CHUNK else ""

    @classmethod
    def from_live(cls, message: str) -> Event:
        """Read a message of the job's channel (`n kind data`).

        Raises:
            ValueError: it is no such message.
        """
        n, kind, data = message.split(" ", 2)
        return cls(int(n), event_kind(kind), data)


@dataclass(frozen=True, slots=True)
class Written:
    """What earlier attempts wrote."""

    text: str
    tokens: tuple[int, ...]
    last_event: int


class JobLog:
    """Reads logs. They are written by the scripts alone.

    A log may expire or be trimmed. Missing events raise `Gone`; they are never skipped.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def read(self, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
        """The events after number `after`, in order: none where the log ends before or is not there.

        Raises:
            Gone: there are later ones, but not all that lie between.
        """
        entries = self._client.xrange(keys.LOG + job_id, min=f"({after}-0", max="+", count=limit)
        events = [_event(entry_id, entry) for entry_id, entry in entries]
        for expected, event in enumerate(events, after + 1):
            if event.n != expected:
                raise Gone(f"The job's log was trimmed: event {expected} is missing.", code="log_trimmed")
        return events

    def last(self, job_id: str) -> Event | None:
        """The newest event; None when there is no log (any more)."""
        newest = self._client.xrevrange(keys.LOG + job_id, count=1)
        return _event(*newest[0]) if newest else None

    def ended(self, job_id: str) -> bool:
        """Whether the job has ended, or is forgotten. Read from its record, which outlives its log."""
        known, finished_at = self._client.hmget(keys.JOB + job_id, "id", "finished_at")
        return known is None or finished_at is not None

    def written(self, job_id: str, last_event: int = 0) -> Written:
        """All text and tokens so far.

        Args:
            last_event: number of an event that is known to have been written.

        Raises:
            Gone: events are missing, at least up to that one.
        """
        events = self.read(job_id)
        if len(events) < last_event:
            raise Gone(f"The job's log was trimmed: event {last_event} is missing.", code="log_trimmed")
        return Written(
            text="".join(event.text for event in events),
            tokens=tuple(token for event in events for token in event.tokens),
            last_event=events[-1].n if events else 0,
        )


def _event(entry_id: str, entry: dict[str, str]) -> Event:
    n = int(entry_id.removesuffix("-0"))
    return Event(n, event_kind(entry["e"]), entry["d"], _tokens(entry.get("t", "")))


def _tokens(joined: str) -> tuple[int, ...]:
    return tuple(map(int, joined.split(","))) if joined else ()


def join_tokens(tokens: Iterable[int]) -> str:
    """Token ids as an entry holds them."""
    return ",".join(map(str, tokens))
