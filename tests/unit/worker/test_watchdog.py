"""The watchdog, one check at a time: a task whose value stays the same is stuck, whatever other tasks do."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest

from worker.process.watchdog import Progress, Watchdog


class Harness:
    """A watchdog, the tasks that it sees, and its reports."""

    def __init__(self) -> None:
        self.tasks: dict[Hashable, Progress] = {}
        self.stuck: list[list[Hashable]] = []
        self.overdue = 0
        self.deaths: list[str] = []
        self.watchdog = Watchdog(lambda: self.tasks, self.stuck.append, self.on_overdue, self.deaths.append)

    def on_overdue(self) -> None:
        self.overdue += 1

    def check(self, **values: float) -> None:
        """Check one second after the last check; each task may stay the same for five."""
        self.tasks = {key: Progress(value, 5) for key, value in values.items()}
        self.watchdog.check(1)


@pytest.fixture
def harness() -> Harness:
    return Harness()


def test_a_task_without_progress_is_stuck_although_another_advances(harness: Harness) -> None:
    for second in range(6):
        harness.check(engine=7, publisher=second)
        assert (harness.stuck, harness.watchdog.tripped) == ([], False)
    harness.check(engine=7, publisher=9)
    assert (harness.stuck, harness.watchdog.tripped) == ([["engine"]], True)


def test_slow_progress_is_progress(harness: Harness) -> None:
    for second in range(50):
        harness.check(engine=second // 5)
    assert not harness.watchdog.tripped


def test_a_task_that_pauses_starts_anew(harness: Harness) -> None:
    for _ in range(20):
        for _ in range(4):
            harness.check(engine=7)
        harness.check()
    assert not harness.watchdog.tripped


def test_time_in_which_the_process_was_stopped_does_not_count(
    harness: Harness, eventually: Callable[..., None]
) -> None:
    clock = iter(range(0, 10**9, 1000))
    tripped: list[bool] = []

    def read_tasks() -> dict[Hashable, Progress]:
        tripped.append(harness.watchdog.tripped)
        return {"engine": Progress(0, 5)}

    harness.watchdog._read_tasks = read_tasks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.process.watchdog.TICK_S", 0.001)
        patch.setattr("worker.process.watchdog.monotonic", lambda: next(clock))  # each check comes 1,000 s late
        harness.watchdog.start()
        eventually(lambda: harness.watchdog.tripped)
        harness.watchdog.stop()
        harness.watchdog.join(5)
    assert tripped.count(False) > 10, "each check counts for half a second at most"


def test_an_overdue_drain_is_reported(harness: Harness) -> None:
    harness.watchdog.end_within(60)
    harness.check()
    assert harness.overdue == 0
    harness.watchdog.end_within(-1)
    harness.watchdog.end_within(60)
    harness.check()
    assert harness.overdue == 1
