"""How much of a prompt is read in a step, on devices whose times are made up."""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from worker.engine.prefill_budget import AIM, LEAST_AIM, LIMIT, MOST_AIM, PAUSE, PAUSE_AFTER, PrefillBudget
from worker.runner.base import PrefillCost

MOST = 32
QUIET = 0.075
SMALL = PrefillCost(fixed=0.03, token=0.0015, behind=5e-6)
"""A model of 135 million parameters on two cores."""


@dataclass
class Device:
    """Takes a while for a decode step and for what is read beside it; `lag` steps later than it was asked to.

    Attributes:
        layers: that a chunk goes through.
        busy: how much longer everything takes because of others.
    """

    cost: PrefillCost = SMALL
    quiet: float = QUIET
    lag: int = 0
    layers: int = 1
    busy: Callable[[], float] = lambda: 1.0

    def read(self, budget: PrefillBudget, tokens: int, behind: int = 0) -> list[tuple[int, float]]:
        """Read a prompt beside rows that decode: of each step the chunk, and its time in quiet steps."""
        steps = []
        pending = deque([0.0] * self.lag)
        position, end = behind, behind + tokens
        size = deep = 0
        while position < end:
            layers = 0
            if not budget.pauses():
                size, deep = (size, deep) if size else (min(budget.chunk(position, self.layers), end - position), 0)
                layers = min(budget.layers(size, position, self.layers), self.layers - deep)
            part, deep = layers / self.layers, deep + layers
            pending.append(self.cost.seconds(size, position) * part)
            seconds = (self.quiet + pending.popleft()) * self.busy()
            budget.stepped(seconds, budget._cost.seconds(size, position) * part)
            steps.append((size if layers else 0, seconds / self.quiet))
            if size and deep == self.layers:
                position, size = position + size, 0
            assert len(steps) < 20_000
        return steps


def expecting(cost: PrefillCost = SMALL) -> PrefillBudget:
    return PrefillBudget(MOST, cost)


@pytest.mark.parametrize("lag", [0, 1])
def test_no_step_of_a_long_prompt_takes_longer_than_is_aimed_at(lag: int) -> None:
    steps = Device(lag=lag).read(expecting(), 4000)
    assert max(ratio for _, ratio in steps) < LIMIT
    sizes = [size for size, _ in steps if size]
    assert sizes[0] > 4 * sizes[-2] > 0


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_a_device_that_is_not_as_it_was_measured_is_learnt(factor: float) -> None:
    expected = PrefillCost(SMALL.fixed * factor, SMALL.token * factor, SMALL.behind * factor)
    steps = [(size, ratio) for size, ratio in Device().read(expecting(expected), 4000) if size][40:-1]
    assert max(ratio for _, ratio in steps) < LIMIT
    assert sum(ratio for _, ratio in steps) / len(steps) > AIM - 0.35


@pytest.mark.parametrize("lag", [0, 1])
def test_a_chunk_far_behind_the_beginning_is_foretold_before_one_was_read(lag: int) -> None:
    assert max(ratio for _, ratio in Device(lag=lag).read(expecting(), 300, behind=3500)) < LIMIT


def test_without_a_measurement_a_token_is_like_another() -> None:
    cost = PrefillCost(0.0, QUIET / 10, 0.0)
    sizes = [size for size, _ in Device(cost).read(PrefillBudget(MOST), 10_000) if size][-50:-1]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == round((MOST_AIM - 1) * 10)


def test_chunks_follow_what_a_step_costs_now() -> None:
    """More rows decode: a step without a chunk is dearer, and a chunk may be too."""
    budget, cost = expecting(), PrefillCost(0.0, QUIET / 10, 0.0)
    before = Device(cost).read(budget, 10_000)[-2][0]
    after = Device(cost, quiet=2 * QUIET).read(budget, 20_000)[-2][0]
    assert after == pytest.approx(2 * before, abs=2)


def test_others_on_the_machine_make_chunks_neither_large_nor_tiny() -> None:
    draw = random.Random(3)
    busy = Device(busy=lambda: draw.choice([1.0, 1.0, 1.0, 1.3, 2.0]))
    budget = expecting()
    busy.read(budget, 4000)
    steps = Device().read(budget, 500, behind=1000)
    assert all(LEAST_AIM - 0.2 < ratio < LIMIT for size, ratio in steps[:-1] if size)


def test_the_aim_is_lower_where_times_vary_and_higher_where_they_do_not() -> None:
    draw = random.Random(5)
    unsteady = Device(busy=lambda: draw.choice([1.0] * 9 + [2.5]))
    budget = expecting()
    unsteady.read(budget, 4000)
    varied = [ratio for size, ratio in unsteady.read(budget, 2000) if size]
    assert statistics.median(varied) == pytest.approx(LEAST_AIM, abs=0.3)
    budget = expecting()
    steady = [ratio for _ in range(3) for size, ratio in Device().read(budget, 4000) if size]
    assert statistics.median(steady[-200:-1]) == pytest.approx(MOST_AIM, abs=0.3)
    assert max(steady) < LIMIT


def test_one_slow_step_changes_little() -> None:
    budget = expecting()
    Device().read(budget, 1010)
    before = budget.chunk(1000, 1)
    budget.stepped(100 * QUIET, budget._cost.seconds(before, 1000))
    assert before / 2 < budget.chunk(1000, 1) <= before


def test_a_part_of_a_chunk_is_tokens_however_little_time_there_is() -> None:
    """Beside a single row a pass alone takes almost as long as may be: with ever less in it, it would never end."""
    device = Device(quiet=0.04)
    steps = device.read(expecting(), 4000)
    for (size, _), position in zip(steps, [sum(size for size, _ in steps[:i]) for i in range(len(steps))], strict=True):
        if size and position + size < 4000:
            assert 1.5 * SMALL.fixed <= SMALL.seconds(size + 1, position)
    assert max(ratio for _, ratio in steps) < 3


def test_chunks_stay_between_their_bounds() -> None:
    cheap, dear = PrefillCost(0.0, QUIET / 1000, 0.0), PrefillCost(0.0, QUIET * 1000, 0.0)
    assert max(size for size, _ in Device(cheap).read(expecting(cheap), 2000)) == MOST
    assert {size for size, _ in Device(dear).read(expecting(dear), 100)} == {0, 1}


def test_the_reading_pauses_for_a_moment_now_and_then() -> None:
    sizes = [size for size, _ in Device().read(expecting(), 4000)]
    assert sizes[:PAUSE] == [0] * PAUSE
    paused = [i for i, size in enumerate(sizes) if not size]
    assert [b - a for a, b in zip(paused[::PAUSE], paused[PAUSE::PAUSE], strict=False)] == [PAUSE_AFTER + PAUSE] * (
        len(paused) // PAUSE - 1
    )


DEEP = 29
"""Layers to go through, of 30."""


@pytest.mark.parametrize("lag", [0, 1])
def test_a_chunk_that_takes_too_long_goes_through_the_model_some_layers_at_a_time(lag: int) -> None:
    shallow = Device(lag=lag).read(expecting(), 4000)
    steps = Device(lag=lag, layers=DEEP).read(expecting(), 4000)
    assert max(ratio for _, ratio in steps) < LIMIT
    assert min(size for size, _ in steps[:-DEEP] if size) >= MOST / 2
    assert len(steps) < 0.7 * len(shallow)


@pytest.mark.parametrize("quiet", [0.02, 0.04])
def test_a_pass_that_takes_longer_than_a_step_may_is_shared_by_steps(quiet: float) -> None:
    steps = Device(quiet=quiet, layers=DEEP).read(expecting(), 2000)
    assert max(ratio for _, ratio in steps) < LIMIT


def test_fewer_tokens_go_through_where_one_layer_of_more_takes_too_long() -> None:
    cost = PrefillCost(QUIET / 100, QUIET / 10, 0.0)
    steps = Device(cost, layers=2).read(expecting(cost), 2000)[10:-1]
    assert max(ratio for _, ratio in steps) < LIMIT
    assert max(size for size, _ in steps) < MOST
    assert statistics.median(ratio for size, ratio in steps if size) > AIM - 0.2


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_with_layers_too_a_device_that_is_not_as_it_was_measured_is_learnt(factor: float) -> None:
    expected = PrefillCost(SMALL.fixed * factor, SMALL.token * factor, SMALL.behind * factor)
    steps = [ratio for size, ratio in Device(layers=DEEP).read(expecting(expected), 4000) if size][40:-1]
    assert max(steps) < LIMIT
    assert statistics.fmean(steps) > AIM - 0.35


def test_steps_that_did_other_things_are_no_measure() -> None:
    budget = expecting()
    Device().read(budget, 500)
    before = budget.chunk(500, 1)
    for _ in range(50):
        budget.stepped(QUIET, 0.0)
        budget.stepped(1000.0, None)
    budget.stepped(1000.0, 0.05)
    assert budget.chunk(500, 1) == before
