"""Following a job: each event comes once and in order, whatever pub/sub loses, repeats or delays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Gone
from shared.jobs.log import Event, EventKind
from web.streaming.follower import Follower
from web.streaming.hub import Signal, Subscription

JOB = "job_1"


def chain(length: int) -> list[Event]:
    """All events of a job; the last is `done`."""
    kinds = [EventKind.QUEUED, EventKind.STARTED, *[EventKind.CHUNK] * length][: length - 1]
    return [Event(n, kind, "{}") for n, kind in enumerate([*kinds, EventKind.DONE], 1)]


class Log:
    """A log in memory whose first reads may fail."""

    def __init__(self, events: list[Event], failures: int = 0) -> None:
        self.events = events
        self.failures = failures
        self.error: redis.RedisError = redis.ConnectionError()

    def last(self, job_id: str) -> Event | None:
        if self.failures:
            self.failures -= 1
            raise self.error
        return self.events[-1] if self.events else None

    def ended(self, job_id: str) -> bool:
        last = self.last(job_id)
        return last is not None and last.kind is EventKind.DONE

    def read(self, job_id: str, after: int = 0, limit: int | None = None) -> list[Event]:
        events = [event for event in self.events if event.n > after][:limit]
        if events and events[0].n != after + 1:
            raise Gone("trimmed")
        return events


class Script:
    """A subscription that plays a script, and appends to the log as the writer would.

    Args:
        sizes: number of items that each `take` returns; default 1.
    """

    def __init__(
        self, log: Log, whole: list[Event], script: list[Event | Signal | None], sizes: list[int] | None = None
    ) -> None:
        self._log, self._whole, self._script, self._sizes = log, whole, script, sizes or []

    def take(self, timeout_s: float) -> list[Event | Signal]:
        items: list[Event | Signal] = []
        for _ in range(self._sizes.pop(0) if self._sizes else 1):
            item = self._script.pop(0) if self._script else None  # after the script, only heartbeats
            if item is None:
                break
            items.append(item)
            if isinstance(item, Event):
                self._write(item.n)
        if not items:
            self._write(len(self._log.events) + 1)
        return items

    def _write(self, n: int) -> None:
        if n > len(self._log.events):
            self._log.events = self._whole[:n]


class FakeHub:
    """A hub with one subscription."""

    def __init__(self, subscription: object) -> None:
        self.subscription = subscription
        self.opened = 0

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        self.opened += 1
        yield self.subscription  # type: ignore[misc]

    subscribe_end = subscribe


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, list[Event | Signal | None]]:
    length = draw(st.integers(2, 30))
    written = draw(st.integers(1, length))
    cursor = draw(st.integers(0, length))
    items = st.one_of(st.sampled_from(chain(length)), st.just(Signal.RESYNC), st.none(), st.sampled_from(chain(length)))
    return length, written, cursor, draw(st.lists(items, max_size=60))


def flat(stream: Iterable[list[Event]]) -> list[Event]:
    return [event for ready in stream for event in ready]


@given(histories(), st.integers(0, 5), st.lists(st.integers(1, 9), max_size=60))
def test_each_event_comes_once_and_in_order_whatever_is_lost(
    history: tuple[int, int, int, list[Event | Signal | None]], failures: int, sizes: list[int]
) -> None:
    length, written, cursor, script = history
    whole = chain(length)
    log = Log(whole[:written])
    follower = Follower(log, FakeHub(Script(log, whole, script, sizes)), 1.0)  # type: ignore[arg-type]
    stream = follower.follow(JOB, cursor)
    log.failures = failures
    assert flat(stream) == (whole[cursor:] or whole[-1:])


def test_an_ended_job_needs_no_subscription() -> None:
    hub = FakeHub(None)
    follower = Follower(Log(chain(5)), hub, 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, 2)) == chain(5)[2:]
    assert hub.opened == 0


def test_a_long_log_is_read_in_pages() -> None:
    log = Log(chain(1700))
    follower = Follower(log, FakeHub(Script(log, log.events, [Signal.RESYNC])), 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, 0)) == chain(1700)


def test_a_missing_or_trimmed_log_is_reported_before_the_stream_begins() -> None:
    with pytest.raises(Gone):
        Follower(Log([]), FakeHub(None), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    with pytest.raises(Gone):
        Follower(Log(chain(9)[4:]), FakeHub(None), 1.0).follow(JOB, 0)  # type: ignore[arg-type]


def test_a_log_that_expires_during_a_stream_is_reported() -> None:
    log = Log(chain(9)[:3])
    stream = Follower(log, FakeHub(Script(log, chain(9), [Signal.RESYNC])), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    assert next(stream) == chain(9)[:3]
    log.events = []
    with pytest.raises(Gone):
        next(stream)


def test_a_shutdown_ends_the_stream() -> None:
    log = Log(chain(9)[:3])
    follower = Follower(log, FakeHub(Script(log, chain(9), [Signal.CLOSING])), 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, 0)) == chain(9)[:3]


def test_waiting_ends_with_the_job() -> None:
    log = Log(chain(3)[:1])
    Follower(log, FakeHub(Script(log, chain(3), [Signal.RESYNC, Signal.ENDED])), 1.0).wait(JOB, 60)  # type: ignore[arg-type]
    assert log.events[-1].kind is not EventKind.DONE, "the hub reported the end"


def test_waiting_ends_at_the_timeout() -> None:
    log = Log(chain(3)[:1])
    Follower(log, FakeHub(Subscription()), 1.0).wait(JOB, 0.05)  # type: ignore[arg-type]
    assert log.events == chain(3)[:1]


def test_waiting_continues_for_a_while_during_a_shutdown() -> None:
    log = Log(chain(3)[:1])
    script: list[Event | Signal | None] = [Signal.CLOSING, None, None, None]
    Follower(log, FakeHub(Script(log, chain(3), script)), 1.0).wait(JOB, None, linger_s=60)  # type: ignore[arg-type]
    assert log.events[-1].kind is EventKind.DONE


@pytest.mark.parametrize("timeout_s", [None, 60])
def test_waiting_ends_with_the_shutdown(timeout_s: float | None) -> None:
    log, subscription = Log(chain(3)[:1]), Subscription()
    subscription.put(Signal.CLOSING)
    Follower(log, FakeHub(subscription), 60).wait(JOB, timeout_s, linger_s=0.01)  # type: ignore[arg-type]
    assert log.events[-1].kind is not EventKind.DONE


@pytest.mark.parametrize("timeout_s", [None, 60])
def test_waiting_continues_while_redis_is_unavailable(timeout_s: float | None) -> None:
    log = Log(chain(3)[:1], failures=3)
    Follower(log, FakeHub(Script(log, chain(3), [])), 1.0).wait(JOB, timeout_s)  # type: ignore[arg-type]
    assert log.failures == 0 and log.events[-1].kind is EventKind.DONE


def test_waiting_ends_with_a_permanent_error_of_redis() -> None:
    log = Log(chain(3)[:1], failures=1)
    log.error = redis.ResponseError("WRONGTYPE")
    with pytest.raises(redis.ResponseError):
        Follower(log, FakeHub(Script(log, chain(3), [])), 1.0).wait(JOB, None)  # type: ignore[arg-type]


def test_a_slow_reader_loses_events_and_gets_resync() -> None:
    subscription = Subscription()
    for event in chain(1000):
        subscription.put(event)
    subscription.put(Signal.CLOSING)
    first, *rest = subscription.take(0)
    assert first is Signal.RESYNC
    assert len(rest) < 300 and rest[-1] is Signal.CLOSING
    assert subscription.take(0) == []


def test_events_that_are_ready_come_together() -> None:
    log = Log(chain(9)[:1])
    script = Script(log, chain(9), [Signal.RESYNC, *chain(9)[1:]], [1, 4, 4])
    stream = Follower(log, FakeHub(script), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    assert [len(ready) for ready in stream] == [1, 4, 4]


def test_live_events_that_were_read_from_the_log_are_skipped_without_reading_it_again() -> None:
    log = Log(chain(9)[:5])
    script = Script(log, chain(9), [Signal.RESYNC, *chain(9)[2:]], [1, 9])
    stream = Follower(log, FakeHub(script), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    assert next(stream) == chain(9)[:5]
    log.failures = 99  # every further read fails
    assert next(stream) == chain(9)[5:]
    assert log.failures == 98  # the log was read only once, after RESYNC


def of_a_newer_version(whole: list[Event]) -> list[Event]:
    """The same events as a newer worker might write them: every third is of an unknown kind."""
    kinds = [f"novelty{event.n}" if event.n % 3 == 0 and event is not whole[-1] else event.kind for event in whole]
    return [event._replace(kind=kind) for event, kind in zip(whole, kinds, strict=True)]


@given(histories(), st.lists(st.integers(1, 9), max_size=60))
def test_events_of_unknown_kinds_are_passed_on(
    history: tuple[int, int, int, list[Event | Signal | None]], sizes: list[int]
) -> None:
    length, written, cursor, script = history
    whole = of_a_newer_version(chain(length))
    items = [whole[item.n - 1] if isinstance(item, Event) and item.n <= length else item for item in script]
    log = Log(whole[:written])
    follower = Follower(log, FakeHub(Script(log, whole, items, sizes)), 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, cursor)) == (whole[cursor:] or whole[-1:])
