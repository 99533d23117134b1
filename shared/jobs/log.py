"""A job's log: the events that clients stream, and the tokens that a new attempt resumes from.

Events are numbered from 1 without gaps. Event n is entry `n-0` of a Redis Stream, and a copy is published on the job's
channel. A channel may lose messages, the log does not: `web.streaming.hub` reads the channel and fills gaps from the
log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from shared.errors import Gone
from shared.redis import keys
from shared.redis.client import Redis


class EventKind(StrEnum):
    """The kind of an event. Newer processes may write other kinds; readers count them and pass them on."""

    QUEUED = "queued"
    """The job is queued. Data: `reason`, which is `accepted`, `worker_lost` or `handed_back`."""
    STARTED = "started"
    """The first attempt started. Data: `attempt`, its number."""
    RESUMED = "resumed"
    """A further attempt resumed where the last one ended. Data: `attempt`, its number."""
    CHUNK = "chunk"
    """Generated text. Data: `text`, and log-probabilities if requested."""
    DONE = "done"
    """The job ended; always the last event. Data: `status`."""


_KINDS: dict[str, str] = {kind.value: kind for kind in EventKind}


def event_kind(name: str) -> str:
    """Return the `EventKind` with this name; the name itself if this version does not know it."""
    return _KINDS.get(name, name)


class Event(NamedTuple):
    """One event.

    Attributes:
        n: its number.
        kind: an `EventKind`, or the name of a kind that this version does not know.
        data: a JSON object as text, because most readers only pass it on.
        tokens: token ids of the text; empty in events from a channel.
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
        """Parse a message of the job's channel (`n kind data`).

        Raises:
            ValueError: the message has another format.
        """
        n, kind, data = message.split(" ", 2)
        return cls(int(n), event_kind(kind), data)


@dataclass(frozen=True, slots=True)
class Written:
    """The output of earlier attempts."""

    text: str
    tokens: tuple[int, ...]
    last_event: int


class JobLog:
    """Reads logs, which only the scripts write.

    A log may expire or be trimmed. Missing events raise `Gone`; they are never skipped.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client

    def read(self, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
        """Return the events after number `after`, in order; none if the log ends earlier or does not exist.

        Raises:
            Gone: an event between `after` and a returned event is missing.
        """
        entries = self._client.xrange(keys.LOG + job_id, min=f"({after}-0", max="+", count=limit)
        events = [_event(entry_id, entry) for entry_id, entry in entries]
        for expected, event in enumerate(events, after + 1):
            if event.n != expected:
                raise Gone(f"The job's log was trimmed: event {expected} is missing.", code="log_trimmed")
        return events

    def last(self, job_id: str) -> Event | None:
        """Return the last event; None if the log does not exist."""
        newest = self._client.xrevrange(keys.LOG + job_id, count=1)
        return _event(*newest[0]) if newest else None

    def ended(self, job_id: str) -> bool:
        """Whether the job has ended or was deleted, by its record, which outlives the log."""
        known, finished_at = self._client.hmget(keys.JOB + job_id, "id", "finished_at")
        return known is None or finished_at is not None

    def written(self, job_id: str, last_event: int = 0) -> Written:
        """Return all text and tokens in the log.

        Args:
            last_event: number of an event that is known to exist.

        Raises:
            Gone: an event up to `last_event` is missing.
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
    """Encode token ids as in a log entry."""
    return ",".join(map(str, tokens))
