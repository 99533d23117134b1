"""How many rows are admitted, on a device whose times are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.plugins.work import claimed, sequence_for
from worker.backends.base import StepResult
from worker.backends.fake import FakeBackend
from worker.crowd import KNOWN_FOR_S, LEAST_STEPS, Crowd
from worker.engine import Engine


class Device(FakeBackend):
    """A step takes what a function of its rows says."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self.now = 0.0
        self._seconds = seconds

    def step(self) -> StepResult:
        """As the fake does."""
        result = super().step()
        self.now += self._seconds(len(result.tokens))
        return result


def crowded(rows: int) -> float:
    """Up to five rows cost no more than one; each more makes the total slower."""
    return 0.01 if rows <= 5 else (rows - 3.0) / 100


def batches(seconds: Callable[[int], float], jobs: int, slots: int = 12, every: int = 8) -> list[int]:
    """A job comes every so many steps until all have ended; the rows of each step."""
    device = Device(seconds)
    engine = Engine(lambda: device, slots, lambda said: None, clock=lambda: device.now)
    engine.load()
    sequences = [sequence_for(claimed("x" * 1100, max_tokens=200), device) for _ in range(jobs)]
    sizes: list[int] = []
    waiting = list(sequences)
    while waiting or engine.busy:
        if waiting and len(sizes) % every == 0:
            engine.submit(waiting.pop(0))
        engine.step()
        sizes.append(engine.totals.last_batch)
        assert len(sizes) < 20_000
    assert all(sequence.ending is not None for sequence in sequences)
    return sizes


def test_where_more_rows_are_slower_in_all_fewer_are_admitted() -> None:
    sizes = batches(crowded, 60)
    settled = sizes[200:-200]
    assert max(sizes) <= 7
    assert settled.count(5) > len(settled) / 2


def test_where_more_rows_give_more_all_slots_are_used() -> None:
    assert batches(lambda rows: (10 + rows) / 1000, 60)[200:-250].count(12) > 500


def test_one_row_always_runs() -> None:
    sizes = batches(lambda rows: rows**3 / 1000, 12)
    assert set(sizes) <= {0, 1, 2}


def fed(crowd: Crowd, now: list[float], rows: int, seconds: float, held: int = 100) -> None:
    for _ in range(LEAST_STEPS + 1):
        now[0] += seconds
        crowd.stepped(rows, held * rows, undisturbed=True)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def crowd(now: list[float]) -> Crowd:
    """Four rows are slower in all than two."""
    crowd = Crowd(lambda: now[0])
    fed(crowd, now, 2, 1.0)
    fed(crowd, now, 4, 3.0)
    return crowd


def test_only_what_was_measured_is_judged(crowd: Crowd) -> None:
    assert [crowd.worth(rows, 100 * rows) for rows in (1, 2, 3, 4, 5)] == [True, True, True, False, False]


def test_contexts_of_another_length_are_another_matter(crowd: Crowd) -> None:
    assert crowd.worth(4, 1000)


def test_what_is_known_grows_old(crowd: Crowd, now: list[float]) -> None:
    now[0] += KNOWN_FOR_S + 1
    assert crowd.worth(4, 400)
    fed(crowd, now, 2, 1.0)
    fed(crowd, now, 4, 1.9)
    assert crowd.worth(4, 400)


def test_steps_that_did_other_things_are_no_measure(crowd: Crowd, now: list[float]) -> None:
    for _ in range(20):
        now[0] += 0.1
        crowd.stepped(4, 400, undisturbed=False)
    assert not crowd.worth(4, 400)
