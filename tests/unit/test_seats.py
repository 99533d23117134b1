"""Slots as task threads take them, and tickets that come while none is free."""

from __future__ import annotations

import threading

from worker.model_worker import Rate
from worker.queue.seats import Seats


def test_a_ticket_that_finds_no_seat_is_made_up_for_by_whoever_leaves_one() -> None:
    seats = Seats(2)
    assert [seats.take() for _ in range(5)] == [True, True, False, False, False]
    assert [seats.leave() for _ in range(5)] == [False, False, False, True, True]
    assert seats.empty
    assert seats.take()


def test_no_ticket_is_lost_and_no_seat_is_taken_twice_whoever_comes_when() -> None:
    seats, lock = Seats(3), threading.Lock()
    at_work = most = done = 0

    def ticket() -> None:
        nonlocal at_work, most, done
        if not seats.take():
            return
        while True:
            with lock:
                at_work += 1
                most = max(most, at_work)
            with lock:
                at_work -= 1
                done += 1
            if seats.leave():
                return

    threads = [threading.Thread(target=lambda: [ticket() for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (done, seats.empty) == (1600, True)
    assert most <= 3


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
