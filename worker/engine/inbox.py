"""Messages from other threads to an engine core, and a snapshot of it that they can read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

from shared.queue.claims import WriteResult
from worker.engine.scheduler import Capacity
from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class JobWriteResult:
    """What Redis says of a job: it must stop, or it belongs to another attempt."""

    job_id: str
    attempt: int
    write_result: WriteResult


@dataclass(frozen=True, slots=True)
class Drain:
    """Accept nothing new; hand back what still runs at a moment (monotonic)."""

    until: float


Message: TypeAlias = Sequence | JobWriteResult | Drain


class Inbox:
    """Messages for the engine thread, and a snapshot of what it could admit. Safe to be used by all threads.

    Args:
        wake: called when there is a message.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._messages: SimpleQueue[Message] = SimpleQueue()  # its put is safe in a signal handler
        self._lock = threading.Lock()
        self._capacity = Capacity(0, 0)
        self._waiting: tuple[Sequence, ...] = ()
        self._submitted: dict[int, Sequence] = {}  # not part of the snapshot yet
        self._received: list[int] = []

    @property
    def empty(self) -> bool:
        """Whether there is no message."""
        return self._messages.empty()

    @property
    def snapshot_due(self) -> bool:
        """Whether sequences were received that are not part of the snapshot."""
        return bool(self._received)

    def put(self, message: Message) -> None:
        """Send a message."""
        if isinstance(message, Sequence):
            with self._lock:
                self._submitted[message.uid] = message
        self._messages.put(message)
        self._wake()

    def receive(self) -> Iterator[Message]:
        """Give the messages so far."""
        with suppress(Empty):
            while True:
                message = self._messages.get_nowait()
                if isinstance(message, Sequence):
                    self._received.append(message.uid)
                yield message

    def show(self, capacity: Capacity, waiting: tuple[Sequence, ...]) -> None:
        """Replace the snapshot; it counts all sequences received so far."""
        with self._lock:
            self._capacity, self._waiting = capacity, waiting
            for uid in self._received:
                self._submitted.pop(uid, None)
            self._received.clear()

    def capacity(self) -> Capacity:
        """Return what could be admitted beside all sequences submitted so far."""
        with self._lock:
            rows = self._capacity.rows - len(self._submitted)
            tokens = self._capacity.tokens - sum(each.longest for each in self._submitted.values())
        return Capacity(max(0, rows), max(0, tokens))

    def waiting(self) -> list[str]:
        """Return the ids of jobs that were submitted and never in the batch, in the order of admission."""
        with self._lock:
            sequences = (*self._waiting, *self._submitted.values())
        return [sequence.job.id for sequence in sequences if not sequence.started]
