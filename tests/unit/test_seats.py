"""Slots of a model among threads of a pool for all models."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from worker.desk import Rate
from worker.seats import Seats


def test_a_ticket_that_finds_no_seat_is_owed_one() -> None:
    seats = Seats(2)
    assert [seats.take() for _ in range(3)] == [True, True, False]
    assert not seats.leave(), "it is done for the ticket that found none"
    assert [seats.leave(), seats.leave()] == [True, True]
    assert seats.take()


def test_no_more_is_owed_than_there_are_seats() -> None:
    seats = Seats(2)
    assert [seats.take() for _ in range(10)] == [True, True, *[False] * 8]
    assert [seats.leave() for _ in range(4)] == [False, False, True, True]


def test_every_ticket_is_worked_on_by_no_more_threads_than_seats() -> None:
    seats, lock = Seats(3), threading.Lock()
    now, most, done = 0, 0, 0

    def work() -> None:
        nonlocal now, most, done
        with lock:
            now += 1
            most = max(most, now)
        with lock:
            now -= 1
            done += 1

    def ticket() -> None:
        if seats.take():
            work()
            while not seats.leave():
                work()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: ticket(), range(200)))
    assert most <= 3
    assert done > 0
    assert [seats.take() for _ in range(3)] == [True] * 3, "all seats are free in the end"


def test_a_rate_is_that_of_the_last_minute() -> None:
    now = [0.0]
    rate = Rate(lambda: now[0])
    assert rate.seen(0) == 0.0
    for second in range(1, 301):
        now[0] = float(second)
        told = rate.seen(10 * second if second <= 200 else 2000 + 30 * (second - 200))
    assert told == 30.0
    now[0] = 500.0
    rate.seen(5000)
    now[0] = 600.0
    assert rate.seen(5000) == 0.0
