"""Several jobs in one stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

from shared.errors import Gone
from shared.jobs.log import Event, EventKind
from tests.support.waiting import eventually
from web.streaming.follower import Watch, no_watch
from web.streaming.merge import follow_all


class FakeFollower:
    """Yields `chunks` events per job. A job named `idle` waits for its watch instead of ending."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.closed: list[str] = []

    def follow(self, job_id: str, cursor: int, watch: Watch = no_watch) -> Generator[list[Event]]:
        if job_id == "trimmed":
            raise Gone("The log was trimmed.")
        return self._events(job_id, cursor, watch)

    def _events(self, job_id: str, cursor: int, watch: Watch) -> Generator[list[Event]]:
        woken = threading.Event()
        try:
            with watch(woken.set):
                for n in range(cursor + 1, cursor + self.chunks + 1):
                    yield [Event(n, EventKind.CHUNK, job_id)]
                if job_id == "broken":
                    raise RuntimeError("broken")
                if job_id == "idle":
                    woken.wait(10)
                    return
                yield [Event(cursor + self.chunks + 1, EventKind.DONE, job_id)]
        finally:
            self.closed.append(job_id)


def follow(follower: FakeFollower, *job_ids: str, watch: Watch = no_watch) -> Any:
    return follow_all(follower, job_ids, watch)  # type: ignore[arg-type]


@pytest.mark.parametrize("jobs", [("a",), ("a", "b", "c")])
def test_every_job_is_followed_in_order(jobs: tuple[str, ...]) -> None:
    follower = FakeFollower(200)
    seen: dict[int, list[int]] = {index: [] for index in range(len(jobs))}
    for index, events in follow(follower, *jobs):
        assert {event.data for event in events} == {jobs[index]}
        seen[index] += [event.n for event in events]
    assert all(numbers == [*range(1, 202)] for numbers in seen.values())
    assert sorted(follower.closed) == sorted(jobs)


@pytest.mark.parametrize("jobs", [("idle",), ("idle", "idle", "b")])
def test_closing_the_stream_ends_all_followers(jobs: tuple[str, ...]) -> None:
    follower = FakeFollower(200)
    feed = follow(follower, *jobs)
    next(feed)
    feed.close()
    eventually(lambda: len(follower.closed) == len(jobs), "all followers have ended")


def test_a_disconnect_ends_the_stream() -> None:
    disconnect: list[Callable[[], None]] = []

    @contextmanager
    def watch(wake: Callable[[], None]) -> Generator[None]:
        disconnect.append(wake)
        yield

    follower = FakeFollower(1)
    feed = follow(follower, "idle", "idle", watch=watch)
    next(feed)
    disconnect[0]()
    assert len([*feed]) == 1, "the other job's event"
    eventually(lambda: len(follower.closed) == 2, "all followers have ended")


def test_an_error_of_one_job_ends_the_stream() -> None:
    follower = FakeFollower(3)
    with pytest.raises(RuntimeError, match="broken"):
        [*follow(follower, "broken", "idle")]
    eventually(lambda: len(follower.closed) == 2, "all followers have ended")


def test_an_error_at_the_start_is_raised_before_the_stream() -> None:
    with pytest.raises(Gone):
        follow(FakeFollower(1), "trimmed", "b")
