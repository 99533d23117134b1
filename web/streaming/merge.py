"""Follow several jobs as one stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from queue import Queue
from threading import Thread
from typing import Final, TypeAlias

from shared.jobs.log import Event
from web.streaming.follower import Follower, Watch, no_watch

Feed: TypeAlias = Generator[tuple[int, list[Event]]]
"""Yields events that are ready, with the index of their job. An empty list means that a heartbeat is due."""

_QUEUED_PER_JOB: Final = 16
_Item: TypeAlias = tuple[int, list[Event] | Exception | None]
"""Events of a job, an error, or None after the last events."""


def follow_all(follower: Follower, job_ids: Sequence[str], watch: Watch = no_watch) -> Feed:
    """Yield the events of several jobs until all have ended. See `Follower.follow`, also for the errors."""
    if len(job_ids) == 1:
        return _indexed(follower.follow(job_ids[0], 0, watch))
    return _merged(follower, job_ids, watch)


def _indexed(events: Generator[list[Event]]) -> Feed:
    with closing(events):
        for ready in events:
            yield 0, ready


class _Wakes:
    """The functions that end the followers of a stream early."""

    def __init__(self) -> None:
        self._wakes: list[Callable[[], None]] = []
        self._called = False

    def watch(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """Register a follower. This is a `Watch`."""
        self._wakes.append(wake)
        if self._called:
            wake()
        return nullcontext()

    def call(self) -> None:
        """Let all present and future followers end."""
        self._called = True
        for wake in [*self._wakes]:
            wake()


def _merged(follower: Follower, job_ids: Sequence[str], watch: Watch) -> Feed:
    wakes = _Wakes()
    return _read([follower.follow(job_id, 0, wakes.watch) for job_id in job_ids], wakes, watch)


def _pump(index: int, events: Generator[list[Event]], items: Queue[_Item]) -> None:
    try:
        with closing(events):
            for ready in events:
                items.put((index, ready))
    except Exception as error:  # noqa: BLE001 - the reader raises it
        items.put((index, error))
    items.put((index, None))


def _read(all_events: Sequence[Generator[list[Event]]], wakes: _Wakes, watch: Watch) -> Feed:
    running = len(all_events)
    items: Queue[_Item] = Queue(_QUEUED_PER_JOB * running)
    for index, events in enumerate(all_events):
        Thread(target=_pump, args=(index, events, items), name="merge", daemon=True).start()
    try:
        with watch(wakes.call):
            while running:
                index, item = items.get()
                if isinstance(item, Exception):
                    raise item
                elif item is None:
                    running -= 1
                else:
                    yield index, item
    finally:
        wakes.call()
        while running:  # the followers may be waiting for a place in the queue
            running -= items.get()[1] is None
