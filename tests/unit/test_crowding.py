"""How many rows are let into the batch, on machines whose times are made up, hours of them in a moment."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.crowding import HOLD_S, LONG, PROOFS, Crowding

SLOTS = 32
BEST = 800.0

Curve = Callable[[int, float], float]
"""Tokens a second in all, of so many rows at a moment."""
Noise = Callable[[float, random.Random], float]
"""How many times longer than that a step takes."""


def healthy(rows: int, now: float) -> float:
    return 1000 * rows / (rows + 8)


def flat(rows: int, now: float) -> float:
    return BEST


def falling(rows: int, now: float) -> float:
    return BEST * rows / 8 * math.exp(1 - rows / 8)


def calm(now: float, rng: random.Random) -> float:
    return 1 + abs(rng.gauss(0, 0.05))


def rough(now: float, rng: random.Random) -> float:
    """Bursts, half of the machine gone for ten seconds in a minute, stops of several seconds."""
    burst = 10 if rng.random() < 0.02 else 1
    stop = 100 if rng.random() < 0.0005 else 1
    return calm(now, rng) * burst * stop * (2 if now % 61 < 10 else 1)


class Machine:
    """A worker that always has more to do than slots, but for what `wanted` says; answers are of 50 to 150 tokens.

    A row that joins is read in one step, beside the others, and that is no step of decoding alone.
    """

    def __init__(
        self, curve: Curve, noise: Noise = calm, seed: int = 1, context: int = 2000, slots: int = SLOTS
    ) -> None:
        self.now = 0.0
        self.crowding = Crowding(slots, lambda: self.now)
        self.caps: list[int] = []
        self.longest_s = 0.0  # that anybody was held back over a step, and that the longest step took
        self.slowest_step_s = 0.0
        self.held = 0
        self.joined = 0
        self.wanted: Callable[[float], int] = lambda now: slots
        self.context = context
        self._slots = slots
        self._curve, self._noise, self._rng = curve, noise, random.Random(seed)
        self._rows: list[int] = []  # tokens that each has still to give
        self._reading: deque[int] = deque()
        self._waiting: deque[float] = deque()

    def run(self, seconds: float) -> float:
        """Tokens a second."""
        start, tokens = self.now, 0
        while self.now < start + seconds:
            tokens += self.step()
        return tokens / (self.now - start)

    def step(self) -> int:
        self._admit()
        read = bool(self._reading)
        if read:
            self._rows.append(self._reading.popleft())
        rows = len(self._rows)
        took = (
            rows / self._curve(rows, self.now) * self._noise(self.now, self._rng) * (1.8 if read else 1)
            if rows
            else 0.05
        )
        self.now += took
        self.slowest_step_s = max(self.slowest_step_s, took)
        self.crowding.stepped(rows, rows * self.context, rows, undisturbed=not read)
        self._rows = [left - 1 for left in self._rows if left > 1]
        self.caps.append(self.crowding.cap)
        return rows

    def _admit(self) -> None:
        taken = len(self._rows) + len(self._reading)
        self._waiting.extend([self.now] * (self.wanted(self.now) - taken - len(self._waiting)))
        most = self.crowding.most(taken, len(self._waiting))
        assert 1 <= most <= self._slots
        while self._waiting and taken < most:
            waited = self.now - self._waiting.popleft()
            self.longest_s = max(self.longest_s, waited)
            self.held += waited > 0
            self.joined += 1
            self._reading.append(self._rng.randint(50, 150))
            taken += 1


def lulls(now: float) -> int:
    return SLOTS if now % 120 < 100 else 6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wanted", [None, lulls])
@pytest.mark.parametrize("curve", [healthy, flat])
def test_no_noise_is_taken_for_a_batch_that_is_too_large(
    curve: Curve, wanted: Callable[[float], int] | None, seed: int
) -> None:
    machine = Machine(curve, rough, seed)
    machine.wanted = wanted or machine.wanted
    machine.run(1800)
    assert set(machine.caps) == {SLOTS}
    assert machine.longest_s <= HOLD_S + machine.slowest_step_s
    assert machine.held < 0.02 * machine.joined


@pytest.mark.parametrize("noise", [calm, rough])
def test_where_more_rows_are_slower_the_batch_becomes_about_as_small_as_is_best(noise: Noise) -> None:
    machine = Machine(falling, noise)
    machine.run(1200)
    rate = machine.run(1800)
    best = max(Machine(falling, noise, slots=rows).run(600) for rows in (6, 8, 10))
    never = Machine(falling, noise)
    never.crowding.most = lambda *_, **__: SLOTS  # type: ignore[method-assign]
    assert rate > 4 * never.run(600)
    assert rate >= 0.9 * best


def capped(most: int = SLOTS - 1) -> Machine:
    machine = Machine(falling)
    while machine.crowding.cap > most:
        assert machine.now < 3600
        machine.run(5)
    return machine


def test_the_cap_goes_where_more_rows_have_become_faster() -> None:
    machine = capped()
    machine._curve = healthy
    machine.run(1200)
    assert machine.crowding.cap == SLOTS
    machine.caps.clear()
    machine.run(600)
    assert set(machine.caps) == {SLOTS}


def test_a_cap_is_widened_step_by_step() -> None:
    machine = capped(14)
    machine._curve = healthy
    machine.run(1200)
    widened = [(before, cap) for before, cap in itertools.pairwise(machine.caps) if cap > before]
    assert len(widened) > 1
    assert all(cap <= max(before + 1, before * 4 // 3) for before, cap in widened)


def test_the_cap_goes_at_once_when_nobody_waits() -> None:
    machine = capped()
    machine.wanted = lambda now: 4
    while machine.crowding.capped and len(machine._rows) + len(machine._waiting) > 4:
        machine.step()
    machine.step()
    assert machine.crowding.cap == SLOTS


def test_the_cap_goes_at_once_when_contexts_become_short() -> None:
    machine = capped()
    machine.context = 900
    machine.run(5)
    assert machine.crowding.cap == SLOTS


def test_nobody_is_held_back_where_steps_are_too_slow_for_a_trial() -> None:
    machine = Machine(lambda rows, now: falling(rows, now) / 8)
    machine.run(1200)
    assert machine.held == 0


@pytest.mark.parametrize("noise", [calm, rough])
def test_rows_that_leave_by_themselves_prove_it_too(noise: Noise) -> None:
    """Steps are too slow for a trial, but now and then there is little to do."""
    machine = Machine(lambda rows, now: falling(rows, now) / 3, noise)
    machine.wanted = lambda now: SLOTS if now % 200 < 100 else 4
    machine.run(1800)
    assert min(machine.caps) <= 8


def test_short_contexts_are_never_tried() -> None:
    machine = Machine(falling, context=LONG - 1)
    machine.run(600)
    assert (set(machine.caps), machine.held) == ({SLOTS}, 0)


def test_who_was_running_before_does_not_wait() -> None:
    crowding = capped().crowding
    assert crowding.most(20, 3, urgent=True) == SLOTS
    assert crowding.most(20, 3) < SLOTS


def test_one_proof_is_not_enough() -> None:
    """Many are slow, fewer are quick, many are slow: that once may have come from elsewhere."""
    now = 0.0
    crowding = Crowding(SLOTS, lambda: now)
    for proof in range(PROOFS):
        assert crowding.cap == SLOTS
        for rows, seconds in [(32, 0.2)] * 12 + [(16, 0.05)] * 12 + [(32, 0.2)] * (12 if proof else 11):
            now += seconds
            crowding.stepped(rows, rows * 2000, rows, undisturbed=True)
    assert crowding.capped


def test_what_was_proven_before_nobody_waited_counts_no_more() -> None:
    machine = capped()
    machine.crowding.most(1, 0)
    assert not machine.crowding.capped
    now = machine.now
    machine.crowding._clock = lambda: now
    machine.crowding._stretches.restart()
    for rows, seconds in [(32, 0.2)] * 12 + [(16, 0.05)] * 12 + [(32, 0.2)] * 11:
        now += seconds
        machine.crowding.stepped(rows, rows * 2000, rows, undisturbed=True)
    assert not machine.crowding.capped


def test_a_lost_batch_has_proven_nothing() -> None:
    crowding = capped().crowding
    crowding.forget()
    assert crowding.cap == SLOTS


@given(
    st.lists(
        st.tuples(
            st.integers(0, 8),
            st.integers(0, 8),
            st.booleans(),
            st.booleans(),
            st.floats(0, 20),
            st.integers(0, 5000),
        ),
        max_size=200,
    )
)
@settings(max_examples=50, deadline=None)
def test_whatever_steps_take_there_is_place_for_one_row_and_nobody_is_held_for_long(
    steps: list[tuple[int, int, bool, bool, float, int]],
) -> None:
    now = 0.0
    held_since: float | None = None
    crowding = Crowding(8, lambda: now)
    for rows, waiting, urgent, undisturbed, seconds, context in steps:
        most = crowding.most(rows, waiting, urgent)
        assert 1 <= most <= 8
        assert not urgent or most == 8
        held = rows and waiting and most < crowding.cap
        held_since = (now if held_since is None else held_since) if held else None
        assert held_since is None or now - held_since < HOLD_S
        now += seconds
        crowding.stepped(rows, rows * context, rows, undisturbed)
