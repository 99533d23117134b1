"""How large the chunks of a prompt become, on devices whose times are made up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from worker.backends.pace import PAUSE, PAUSE_AFTER, SMALLEST, Pace

MOST = 64


def read(pace: Pace, steps: int, seconds: Callable[[int], float], lag: int = 0) -> list[int]:
    """Step so often beside a long prompt; a step's time has the chunk of `lag` steps before. The chunks."""
    sizes: list[int] = []
    pending = deque([0] * lag)
    for _ in range(steps):
        sizes.append(pace.next(decoding=True))
        pending.append(sizes[-1])
        pace.stepped(seconds(pending.popleft()), sizes[-1])
    return sizes


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("a_token", "a_chunk"), [(0.5, 0), (0.25, 4), (0.4, 2)], ids=str)
def test_a_step_with_a_chunk_takes_twice_as_long_as_one_without(a_token: float, a_chunk: float, lag: int) -> None:
    pace = Pace(MOST)
    last = read(pace, 200, lambda size: 10 + (a_chunk + a_token * size if size else 0), lag)[-20:]
    assert all(18 <= 10 + a_chunk + a_token * size <= 20 for size in last if size)


def test_chunks_stay_between_their_bounds() -> None:
    assert max(read(Pace(MOST), 100, lambda size: 10 + size / 1000)) == MOST
    assert min(filter(None, read(Pace(MOST), 100, lambda size: 10 + size * 1000))) == MOST // SMALLEST
    assert set(read(Pace(1), 100, lambda size: 10 + size * 1000)) == {0, 1}


def test_chunks_follow_what_a_step_costs_now() -> None:
    """More rows decode: a step without a chunk is dearer, and a chunk may be too."""
    pace = Pace(MOST)
    assert read(pace, 100, lambda size: 10 + size / 2)[-1] == 20
    assert read(pace, 300, lambda size: 20 + size / 2)[-1] == 40


def test_one_slow_step_changes_nothing() -> None:
    pace = Pace(MOST)
    read(pace, 100, lambda size: 10 + size / 2)
    pace.stepped(500, pace.tokens)
    assert pace.tokens == 20


def test_the_reading_pauses_for_a_moment_now_and_then() -> None:
    sizes = read(Pace(MOST), 10 * (PAUSE_AFTER + PAUSE), lambda size: 10 + size / 2)
    assert sizes.count(0) == 10 * PAUSE
    assert sizes[:PAUSE] == [0] * PAUSE


def test_nobody_waits_where_nothing_decodes() -> None:
    pace = Pace(MOST)
    read(pace, 100, lambda size: 10 + size / 2)
    assert [pace.next(decoding=False) for _ in range(100)] == [MOST] * 100


def test_steps_that_did_other_things_are_no_measure() -> None:
    pace = Pace(MOST)
    for _ in range(50):
        pace.stepped(10, 0)
        pace.stepped(1000, None)
    pace.stepped(1000, MOST)
    assert pace.tokens == MOST
