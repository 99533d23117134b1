"""The watchdog, check by check: what gains nothing is stuck, whatever else goes on."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest

from worker.process.watchdog import Progress, Watchdog


class Yard:
    """A watchdog, what it sees, and what it told."""

    def __init__(self) -> None:
        self.tasks: dict[Hashable, Progress] = {}
        self.stuck: list[list[Hashable]] = []
        self.late = 0
        self.deaths: list[str] = []
        self.dog = Watchdog(lambda: self.tasks, self.stuck.append, self.be_late, self.deaths.append)

    def be_late(self) -> None:
        self.late += 1

    def see(self, **values: float) -> None:
        """A second later, this is under way; each may take five."""
        self.tasks = {key: Progress(value, 5) for key, value in values.items()}
        self.dog.check(1)


@pytest.fixture
def yard() -> Yard:
    return Yard()


def test_what_gains_nothing_is_stuck_though_its_neighbour_gets_on(yard: Yard) -> None:
    for second in range(6):
        yard.see(engine=7, publisher=second)
        assert (yard.stuck, yard.dog.tripped) == ([], False)
    yard.see(engine=7, publisher=9)
    assert (yard.stuck, yard.dog.tripped) == ([["engine"]], True)


def test_what_gets_on_now_and_then_is_not_stuck(yard: Yard) -> None:
    for second in range(50):
        yard.see(engine=second // 5)
    assert not yard.dog.tripped


def test_rest_is_no_standstill(yard: Yard) -> None:
    for _ in range(20):
        for _ in range(4):
            yard.see(engine=7)
        yard.see()
    assert not yard.dog.tripped


def test_a_process_that_was_stopped_has_not_stood_still(yard: Yard, eventually: Callable[..., None]) -> None:
    clock = iter(range(0, 10**9, 1000))
    looks: list[bool] = []

    def look() -> dict[Hashable, Progress]:
        looks.append(yard.dog.tripped)
        return {"engine": Progress(0, 5)}

    yard.dog._look = look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.process.watchdog.TICK_S", 0.001)
        patch.setattr("worker.process.watchdog.monotonic", lambda: next(clock))  # each check comes 1,000 s late
        yard.dog.start()
        eventually(lambda: yard.dog.tripped)
        yard.dog.stop()
        yard.dog.join(5)
    assert looks.count(False) > 10, "each of them counts for as long as a check may take at most"


def test_a_drain_that_takes_too_long_is_told(yard: Yard) -> None:
    yard.dog.end_within(60)
    yard.see()
    assert yard.late == 0
    yard.dog.end_within(-1)
    yard.dog.end_within(60)
    yard.see()
    assert yard.late == 1
