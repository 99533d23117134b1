"""Live events over one pub/sub connection per process, shared by all its streams.

Messages can be lost: while the connection is down, or because the queue of a slow reader is full. Whenever a reader may
have missed a message, the hub sends it `RESYNC`, and the reader reads the job's log.
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
from shared.redis import keys
from shared.redis.client import Redis

log = logging.getLogger(__name__)

_QUEUE_LENGTH: Final = 256
_PING_AFTER_S: Final = 5.0
"""Seconds without a message after which the hub sends a ping; after as long again, it reconnects."""
_RECONNECT_S: Final = 0.25
_ANCHOR: Final = "anchor"
"""A channel without messages. It keeps the connection in subscriber mode while there are no readers."""


class Signal(Enum):
    """What a reader gets besides events."""

    RESYNC = auto()
    """Events are live from here on; earlier ones must be read from the log."""
    CLOSING = auto()
    """The process is shutting down."""
    ENDED = auto()
    """The job has ended; only for subscriptions to a job's end."""
    DISCONNECTED = auto()
    """The reader's client has disconnected."""


Item: TypeAlias = Event | Signal


class Subscription:
    """The bounded queue of one reader. The hub never waits for the reader: if the queue is full, it drops events."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._overflowed = False

    def take(self, timeout_s: float) -> list[Item]:
        """Return all queued items in order; wait for the first one. The list is empty after a timeout."""
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
        """Queue an item. If the queue is full, drop it, and let the reader start with `RESYNC`."""
        droppable = isinstance(item, Event) or item is Signal.RESYNC
        if droppable and self._items.qsize() >= _QUEUE_LENGTH:
            self._overflowed = True
        else:
            self._items.put(item)


@dataclass(slots=True)
class _Channel:
    """The readers of a channel, and whether Redis has acknowledged the subscription (`live`)."""

    readers: set[Subscription] = field(default_factory=set)
    live: bool = False

    def send(self, item: Item) -> None:
        for reader in self.readers:
            reader.put(item)


class Hub:
    """Distributes live events of jobs to their readers.

    Only the receiver thread (a greenlet under gunicorn) reads from the connection and reopens it; other threads only
    send commands. redis-py's PubSub class is not used because it reconnects silently, which would hide gaps.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._channels: dict[str, _Channel] = {}
        self._unacknowledged: Counter[str] = Counter()
        """Subscribe commands without an acknowledgement, by channel."""
        self._connection: Any = None
        self._receiver: threading.Thread | None = None
        self._closing = False

    def subscribe(self, job_id: str) -> AbstractContextManager[Subscription]:
        """Subscribe to a job's live events. The first item is `RESYNC`, after Redis has acknowledged."""
        return self._subscribe(keys.LIVE + job_id)

    def subscribe_end(self, job_id: str) -> AbstractContextManager[Subscription]:
        """Subscribe to a job's end, which arrives as `ENDED`. The first item is `RESYNC`."""
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
        """Whether the process is shutting down."""
        return self._closing

    def close(self) -> None:
        """Send `CLOSING` to all present and future readers."""
        with self._lock:
            self._closing = True
            for channel in self._channels.values():
                channel.send(Signal.CLOSING)

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
            if self._receiver is None:
                self._receiver = threading.Thread(target=self._run, name="hub", daemon=True)
                self._receiver.start()

    def _leave(self, name: str, subscription: Subscription) -> None:
        with self._lock:
            channel = self._channels[name]
            channel.readers.discard(subscription)
            if not channel.readers:
                del self._channels[name]
                self._send("UNSUBSCRIBE", name)

    def _send(self, command: str, *names: str) -> None:
        if self._connection is None:
            return  # the receiver subscribes to all channels when it has connected
        if command == "SUBSCRIBE":
            self._unacknowledged.update(names)
        # The receiver notices a broken connection. A health check here would read replies meant for the receiver.
        with suppress(redis.RedisError, OSError):
            self._connection.send_command(command, *names, check_health=False)

    def _run(self) -> None:
        failing = False
        while True:
            try:
                self._open()
                failing = False
                self._receive()
            except (redis.RedisError, OSError) as error:
                if not failing:
                    log.warning("live_events_unavailable", extra={"reason": str(error)})
                failing = True
            except Exception:  # for example a malformed message: if this thread ended, all streams would stall
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
            self._unacknowledged.clear()
            for channel in self._channels.values():
                channel.live = False
        if connection is not None:
            connection.disconnect()
            self._client.connection_pool.release(connection)

    def _receive(self) -> None:
        pinged = False
        while True:
            try:
                reply = self._connection.read_response(timeout=_PING_AFTER_S, disconnect_on_error=False)
            except redis.TimeoutError:
                if pinged:
                    raise
                pinged = True
                with self._lock:
                    self._connection.send_command("PING", check_health=False)
                continue
            pinged = False
            self._dispatch(reply)

    def _dispatch(self, reply: list[Any]) -> None:
        kind, name = reply[0], reply[1]
        with self._lock:
            if kind == "message" and name in self._channels:
                self._channels[name].send(_item(name, reply[2]))
            elif kind == "subscribe":
                self._acknowledge(name)

    def _acknowledge(self, name: str) -> None:
        # If a channel was left and joined again, only the last acknowledgement belongs to the present subscription.
        self._unacknowledged[name] -= 1
        if self._unacknowledged[name] <= 0:
            del self._unacknowledged[name]
            channel = self._channels.get(name)
            if channel is not None:
                channel.live = True
                channel.send(Signal.RESYNC)


def _item(name: str, message: str) -> Item:
    """Parse a message. A malformed one becomes `RESYNC`, so that its reader gets the event from the log."""
    if name.startswith(keys.DONE):
        return Signal.ENDED
    try:
        return Event.from_live(message)
    except ValueError:
        return Signal.RESYNC
