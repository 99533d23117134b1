"""Messages from other threads to an engine core, and a snapshot of the core for these threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeAlias

from shared.queue.claims import WriteResult
from worker.engine.scheduler import Capacity
from worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class JobWriteResult:
    """A result from Redis for one attempt of a job: it must stop, or the attempt is fenced."""

    job_id: str
    attempt: int
    write_result: WriteResult


@dataclass(frozen=True, slots=True)
class Drain:
    """Accept no more rows; hand back those that still run at a monotonic moment."""

    until: float


@dataclass(frozen=True, slots=True)
class ErasePrefixes:
    """Drop the cached prefixes of owners that were not used after a time, by owner."""

    cutoffs: Mapping[str, float]


Message: TypeAlias = Sequence | JobWriteResult | Drain | ErasePrefixes


class Inbox:
    """Messages for the engine thread, and a snapshot of what it could admit. Any thread may call any method.

    Args:
        wake: called after each message.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._messages: SimpleQueue[Message] = SimpleQueue()  # its put is safe in a signal handler
        self._lock = threading.Lock()
        self._capacity = Capacity(0, 0)
        self._waiting: tuple[Sequence, ...] = ()
        self._submitted: dict[int, Sequence] = {}  # not in the snapshot yet
        self._received: list[int] = []

    @property
    def empty(self) -> bool:
        """Whether there is no message."""
        return self._messages.empty()

    @property
    def snapshot_due(self) -> bool:
        """Whether sequences were received that are not in the snapshot."""
        return bool(self._received)

    def put(self, message: Message) -> None:
        """Send a message."""
        if isinstance(message, Sequence):
            with self._lock:
                self._submitted[message.uid] = message
        self._messages.put(message)
        self._wake()

    def receive(self) -> Iterator[Message]:
        """Yield the messages so far."""
        with suppress(Empty):
            while True:
                message = self._messages.get_nowait()
                if isinstance(message, Sequence):
                    self._received.append(message.uid)
                yield message

    def set_snapshot(self, capacity: Capacity, waiting: tuple[Sequence, ...]) -> None:
        """Replace the snapshot by one that includes all sequences received so far."""
        with self._lock:
            self._capacity, self._waiting = capacity, waiting
            for uid in self._received:
                self._submitted.pop(uid, None)
            self._received.clear()

    def capacity(self) -> Capacity:
        """Return what could be admitted in addition to all sequences submitted so far."""
        with self._lock:
            rows = self._capacity.rows - len(self._submitted)
            tokens = self._capacity.tokens - sum(each.max_length for each in self._submitted.values())
            return Capacity(max(0, rows), max(0, tokens), self._capacity.reserve)

    def waiting(self) -> list[str]:
        """Return the ids of submitted jobs that were never in the batch, in the order of admission."""
        with self._lock:
            sequences = (*self._waiting, *self._submitted.values())
        return [sequence.job.id for sequence in sequences if not sequence.started]
