"""Live events: one pub/sub connection per process, shared by all its streams.

What comes over pub/sub may be lost: while the connection is away, or because a slow client's queue is full. The
hub never hides that. It sends a subscriber `RESYNC` whenever something may have been missed; the subscriber then
reads the job's log.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, TypeAlias

import redis

from shared.jobs.log import Event
from shared.queue import keys
from shared.queue.redis import Redis

log = logging.getLogger(__name__)

_QUEUE_LENGTH: Final = 256
_QUIET_S: Final = 5.0
"""A connection this silent is asked for a sign of life; one that stays silent as long again is dropped."""
_RECONNECT_S: Final = 0.25
_ANCHOR: Final = "anchor"
"""A channel without messages: without any subscription, Redis would treat the connection as an ordinary one."""


class Signal(Enum):
    """What a subscriber gets beside events."""

    RESYNC = auto()
    """From here on events come live; what was written before stands in the log."""
    CLOSING = auto()
    """The process is about to end."""
    ENDED = auto()
    """The job has ended; only for subscriptions to a job's end."""


Item: TypeAlias = Event | Signal


class Subscription:
    """One reader's bounded queue. The hub fills it and never waits for the reader."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._overflowed = False

    def take(self, timeout_s: float) -> list[Item]:
        """All that is there, in order; waits until there is something, and is empty when nothing came in time."""
        items: list[Item] = []
        if self._overflowed:
            self._overflowed = False
            items.append(Signal.RESYNC)
        try:
            items.append(self._items.get(timeout=0 if items else timeout_s))
        except queue.Empty:
            return items
        while self._items.qsize():
            items.append(self._items.get())
        return items

    def put(self, item: Item) -> None:
        """Hand an item over, or note that there was no room for it."""
        droppable = isinstance(item, Event) or item is Signal.RESYNC  # the overflow says the same
        if droppable and self._items.qsize() >= _QUEUE_LENGTH:
            self._overflowed = True
        else:
            self._items.put(item)


@dataclass(slots=True)
class _Channel:
    readers: set[Subscription] = field(default_factory=set)
    live: bool = False

    def tell(self, item: Item) -> None:
        for reader in self.readers:
            reader.put(item)


class Hub:
    """Hands each job's live events to its subscribers.

    Only the reader thread (a greenlet under gunicorn) reads from the connection and opens it anew; others only send
    on it. redis-py's own PubSub would reconnect silently, and nobody would know of the gap.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._channels: dict[str, _Channel] = {}
        self._unanswered: Counter[str] = Counter()
        self._connection: Any = None
        self._reader: threading.Thread | None = None
        self._closing = False

    def subscribe(self, job_id: str) -> AbstractContextManager[Subscription]:
        """A job's live events; the first item is `RESYNC`, once Redis has acknowledged."""
        return self._subscribe(keys.LIVE + job_id)

    def subscribe_end(self, job_id: str) -> AbstractContextManager[Subscription]:
        """A job's end alone, as `ENDED`: one message however long the answer; the first item is `RESYNC`."""
        return self._subscribe(keys.DONE + job_id)

    @contextmanager
    def _subscribe(self, name: str) -> Iterator[Subscription]:
        subscription = Subscription()
        self._join(name, subscription)
        try:
            yield subscription
        finally:
            self._leave(name, subscription)

    @property
    def closing(self) -> bool:
        """Whether the process is about to end."""
        return self._closing

    def close(self) -> None:
        """Tell every reader, those to come too, that the process is about to end."""
        with self._lock:
            self._closing = True
            for channel in self._channels.values():
                channel.tell(Signal.CLOSING)

    def _join(self, name: str, subscription: Subscription) -> None:
        with self._lock:
            channel = self._channels.setdefault(name, _Channel())
            channel.readers.add(subscription)
            if self._closing:
                subscription.put(Signal.CLOSING)
            elif channel.live:
                subscription.put(Signal.RESYNC)
            elif len(channel.readers) == 1:
                self._send("SUBSCRIBE", name)
            if self._reader is None:
                self._reader = threading.Thread(target=self._read_for_ever, name="hub", daemon=True)
                self._reader.start()

    def _leave(self, name: str, subscription: Subscription) -> None:
        with self._lock:
            channel = self._channels[name]
            channel.readers.discard(subscription)
            if not channel.readers:
                del self._channels[name]
                self._send("UNSUBSCRIBE", name)

    def _send(self, command: str, *names: str) -> None:
        if self._connection is None:
            return  # the reader subscribes to everything once it has a connection
        if command == "SUBSCRIBE":
            self._unanswered.update(names)
        # The reader notices a broken connection by itself. A health check would read here what is the reader's.
        with suppress(redis.RedisError, OSError):
            self._connection.send_command(command, *names, check_health=False)

    def _read_for_ever(self) -> None:
        away = False
        while True:
            try:
                self._open()
                away = False
                self._read()
            except (redis.RedisError, OSError) as error:
                if not away:
                    log.warning("live_events_away", extra={"reason": str(error)})
                away = True
            except Exception:  # a message that cannot be read, say: without the reader every stream would wait in vain
                log.exception("live_events_failed")
            self._drop()
            time.sleep(_RECONNECT_S)

    def _open(self) -> None:
        connection = self._client.connection_pool.get_connection()
        with self._lock:
            self._connection = connection
            self._send("SUBSCRIBE", _ANCHOR, *self._channels)

    def _drop(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            self._unanswered.clear()
            for channel in self._channels.values():
                channel.live = False
        if connection is not None:
            connection.disconnect()
            self._client.connection_pool.release(connection)

    def _read(self) -> None:
        asked = False
        while True:
            try:
                reply = self._connection.read_response(timeout=_QUIET_S, disconnect_on_error=False)
            except redis.TimeoutError:
                if asked:
                    raise
                asked = True
                with self._lock:
                    self._connection.send_command("PING", check_health=False)
                continue
            asked = False
            self._dispatch(reply)

    def _dispatch(self, reply: list[Any]) -> None:
        kind, name = reply[0], reply[1]
        with self._lock:
            if kind == "message" and name in self._channels:
                self._channels[name].tell(_item(name, reply[2]))
            elif kind == "subscribe":
                self._acknowledged(name)

    def _acknowledged(self, name: str) -> None:
        # A channel left and joined again is live only after the last of its acknowledgements.
        self._unanswered[name] -= 1
        if self._unanswered[name] <= 0:
            del self._unanswered[name]
            channel = self._channels.get(name)
            if channel is not None:
                channel.live = True
                channel.tell(Signal.RESYNC)


def _item(name: str, message: str) -> Item:
    """The item of a message; `RESYNC` when it cannot be read, because then the log must be."""
    if name.startswith(keys.DONE):
        return Signal.ENDED
    try:
        return Event.from_live(message)
    except ValueError:
        return Signal.RESYNC
