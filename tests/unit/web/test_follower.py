"""Following a job: whatever pub/sub loses, repeats or delays, each event comes once and in order."""

from __future__ import annotations

import time
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
    """A job's events: so many, the last of them its end."""
    kinds = [EventKind.QUEUED, EventKind.STARTED, *[EventKind.CHUNK] * length][: length - 1]
    return [Event(n, kind, "{}") for n, kind in enumerate([*kinds, EventKind.DONE], 1)]


class Log:
    """A log in memory that may be away for some reads."""

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
    """A subscription that gives what it was told to, so many at a time, and grows the log as the writer would."""

    def __init__(
        self, log: Log, whole: list[Event], script: list[Event | Signal | None], sizes: list[int] | None = None
    ) -> None:
        self._log, self._whole, self._script, self._sizes = log, whole, script, sizes or []

    def take(self, timeout_s: float) -> list[Event | Signal]:
        items: list[Event | Signal] = []
        for _ in range(self._sizes.pop(0) if self._sizes else 1):
            item = self._script.pop(0) if self._script else None  # in the end, only heartbeats
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


class Live:
    """A hub with one scripted subscription."""

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
def test_whatever_is_lost_each_event_comes_once_and_in_order(
    history: tuple[int, int, int, list[Event | Signal | None]], failures: int, sizes: list[int]
) -> None:
    length, written, cursor, script = history
    whole = chain(length)
    log = Log(whole[:written])
    follower = Follower(log, Live(Script(log, whole, script, sizes)), 1.0)  # type: ignore[arg-type]
    stream = follower.follow(JOB, cursor)
    log.failures = failures
    assert flat(stream) == (whole[cursor:] or whole[-1:])


def test_a_finished_job_needs_no_live_events() -> None:
    live = Live(None)
    follower = Follower(Log(chain(5)), live, 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, 2)) == chain(5)[2:]
    assert live.opened == 0


def test_a_long_log_is_read_in_pages() -> None:
    log = Log(chain(1700))
    follower = Follower(log, Live(Script(log, log.events, [Signal.RESYNC])), 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, 0)) == chain(1700)


def test_a_log_that_is_gone_is_told_before_anything_is_sent() -> None:
    with pytest.raises(Gone):
        Follower(Log([]), Live(None), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    with pytest.raises(Gone):
        Follower(Log(chain(9)[4:]), Live(None), 1.0).follow(JOB, 0)  # type: ignore[arg-type]


def test_a_log_that_goes_in_mid_stream_is_told() -> None:
    log = Log(chain(9)[:3])
    stream = Follower(log, Live(Script(log, chain(9), [Signal.RESYNC])), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    assert next(stream) == chain(9)[:3]
    log.events = []
    with pytest.raises(Gone):
        next(stream)


def test_the_end_of_the_process_ends_the_stream() -> None:
    log = Log(chain(9)[:3])
    follower = Follower(log, Live(Script(log, chain(9), [Signal.CLOSING])), 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, 0)) == chain(9)[:3]


def test_waiting_ends_with_the_job_or_the_time() -> None:
    log = Log(chain(3)[:1])
    Follower(log, Live(Script(log, chain(3), [Signal.RESYNC, Signal.ENDED])), 1.0).wait(JOB, 60)  # type: ignore[arg-type]
    asked_at = time.monotonic()
    Follower(Log(chain(3)[:1]), Live(Subscription()), 1.0).wait(JOB, 0.05)  # type: ignore[arg-type]
    assert time.monotonic() - asked_at < 5


def test_an_answer_is_waited_for_even_while_the_process_ends() -> None:
    log = Log(chain(3)[:1])
    script: list[Event | Signal | None] = [Signal.CLOSING, None, None, None]
    Follower(log, Live(Script(log, chain(3), script)), 1.0).wait(JOB, None, linger_s=60)  # type: ignore[arg-type]
    assert log.events[-1].kind is EventKind.DONE


@pytest.mark.parametrize("timeout_s", [None, 60])
def test_waiting_ends_with_the_process(timeout_s: float | None) -> None:
    log, live = Log(chain(3)[:1]), Subscription()
    live.put(Signal.CLOSING)
    Follower(log, Live(live), 60).wait(JOB, timeout_s, linger_s=0.01)  # type: ignore[arg-type]
    assert log.events[-1].kind is not EventKind.DONE


@pytest.mark.parametrize("timeout_s", [None, 60])
def test_waiting_outlasts_redis(timeout_s: float | None) -> None:
    log = Log(chain(3)[:1], failures=3)
    Follower(log, Live(Script(log, chain(3), [])), 1.0).wait(JOB, timeout_s)  # type: ignore[arg-type]
    assert log.failures == 0 and log.events[-1].kind is EventKind.DONE


def test_waiting_does_not_outlast_what_does_not_pass() -> None:
    log = Log(chain(3)[:1], failures=1)
    log.error = redis.ResponseError("WRONGTYPE")
    with pytest.raises(redis.ResponseError):
        Follower(log, Live(Script(log, chain(3), [])), 1.0).wait(JOB, None)  # type: ignore[arg-type]


def test_a_slow_reader_loses_events_and_learns_of_it() -> None:
    subscription = Subscription()
    for event in chain(1000):
        subscription.put(event)
    subscription.put(Signal.CLOSING)
    doubt, *rest = subscription.take(0)
    assert doubt is Signal.RESYNC
    assert len(rest) < 300 and rest[-1] is Signal.CLOSING
    assert subscription.take(0) == []


def test_what_is_there_at_once_is_given_at_once() -> None:
    log = Log(chain(9)[:1])
    script = Script(log, chain(9), [Signal.RESYNC, *chain(9)[1:]], [1, 4, 4])
    stream = Follower(log, Live(script), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    assert [len(ready) for ready in stream] == [1, 4, 4]


def test_what_was_read_from_the_log_already_is_passed_over_without_reading_it_again() -> None:
    log = Log(chain(9)[:5])
    script = Script(log, chain(9), [Signal.RESYNC, *chain(9)[2:]], [1, 9])
    stream = Follower(log, Live(script), 1.0).follow(JOB, 0)  # type: ignore[arg-type]
    assert next(stream) == chain(9)[:5]
    log.failures = 99  # whoever reads it now goes without
    assert next(stream) == chain(9)[5:]
    assert log.failures == 98  # it was asked after the signal only


def of_a_newer_version(whole: list[Event]) -> list[Event]:
    """The same job as a newer worker might write it: every third event is of a kind that this version lacks."""
    kinds = [f"novelty{event.n}" if event.n % 3 == 0 and event is not whole[-1] else event.kind for event in whole]
    return [event._replace(kind=kind) for event, kind in zip(whole, kinds, strict=True)]


@given(histories(), st.lists(st.integers(1, 9), max_size=60))
def test_events_of_a_newer_version_count_and_end_nothing(
    history: tuple[int, int, int, list[Event | Signal | None]], sizes: list[int]
) -> None:
    length, written, cursor, script = history
    whole = of_a_newer_version(chain(length))
    items = [whole[item.n - 1] if isinstance(item, Event) and item.n <= length else item for item in script]
    log = Log(whole[:written])
    follower = Follower(log, Live(Script(log, whole, items, sizes)), 1.0)  # type: ignore[arg-type]
    assert flat(follower.follow(JOB, cursor)) == (whole[cursor:] or whole[-1:])
