"""The prefill budget: how much of a long prompt a step processes, on simulated devices."""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from worker.engine.prefill_budget import AIM, LIMIT, MAX_AIM, MIN_AIM, PAUSE, PAUSE_AFTER, PrefillBudget
from worker.runner.cost import PrefillCost

MAX_CHUNK = 32
PLAIN_S = 0.075
SMALL = PrefillCost(fixed=0.03, token=0.0015, attention=5e-6)
"""The cost of a model with 135 million parameters on two cores."""


@dataclass
class Device:
    """A simulated device.

    Attributes:
        cost: actual cost of prefill passes.
        plain_s: seconds of a decode step without prefill.
        lag: number of steps by which the device runs behind the host.
        layers: number of layers of a pass.
        busy: returns a factor by which other load makes the step longer.
    """

    cost: PrefillCost = SMALL
    plain_s: float = PLAIN_S
    lag: int = 0
    layers: int = 1
    busy: Callable[[], float] = lambda: 1.0

    def prefill(self, budget: PrefillBudget, tokens: int, cached: int = 0) -> list[tuple[int, float]]:
        """Prefill a prompt while other rows decode.

        Returns:
            By step, the size of the chunk, and the duration as a multiple of a step without prefill.
        """
        steps = []
        pending = deque([0.0] * self.lag)
        position, end = cached, cached + tokens
        size = done_layers = 0
        while position < end:
            layers = 0
            if not budget.pauses():
                if not size:
                    size, done_layers = min(budget.chunk(position, self.layers), end - position), 0
                layers = min(budget.layers(size, position, self.layers), self.layers - done_layers)
            part, done_layers = layers / self.layers, done_layers + layers
            pending.append(self.cost.seconds(size, position) * part)
            seconds = (self.plain_s + pending.popleft()) * self.busy()
            budget.record_step(seconds, budget._cost.seconds(size, position) * part)
            steps.append((size if layers else 0, seconds / self.plain_s))
            if size and done_layers == self.layers:
                position, size = position + size, 0
            assert len(steps) < 20_000
        return steps


def budget_for(cost: PrefillCost = SMALL) -> PrefillBudget:
    """Return a budget that expects this cost."""
    return PrefillBudget(MAX_CHUNK, cost)


@pytest.mark.parametrize("lag", [0, 1])
def test_no_step_of_a_long_prompt_exceeds_the_limit(lag: int) -> None:
    steps = Device(lag=lag).prefill(budget_for(), 4000)
    assert max(ratio for _, ratio in steps) < LIMIT
    sizes = [size for size, _ in steps if size]
    assert sizes[0] > 4 * sizes[-2] > 0


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_the_budget_adapts_to_a_device_that_differs_from_the_measurement(factor: float) -> None:
    expected = PrefillCost(SMALL.fixed * factor, SMALL.token * factor, SMALL.attention * factor)
    steps = [(size, ratio) for size, ratio in Device().prefill(budget_for(expected), 4000) if size][40:-1]
    assert max(ratio for _, ratio in steps) < LIMIT
    assert sum(ratio for _, ratio in steps) / len(steps) > AIM - 0.35


@pytest.mark.parametrize("lag", [0, 1])
def test_the_first_chunk_after_a_long_prefix_is_within_the_limit(lag: int) -> None:
    assert max(ratio for _, ratio in Device(lag=lag).prefill(budget_for(), 300, cached=3500)) < LIMIT


def test_without_a_measurement_all_tokens_cost_the_same() -> None:
    cost = PrefillCost(0.0, PLAIN_S / 10, 0.0)
    sizes = [size for size, _ in Device(cost).prefill(PrefillBudget(MAX_CHUNK), 10_000) if size][-50:-1]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == round((MAX_AIM - 1) * 10)


def test_chunks_grow_with_the_duration_of_a_plain_step() -> None:
    """If more rows decode, a step without a chunk takes longer, and so may a chunk."""
    budget, cost = budget_for(), PrefillCost(0.0, PLAIN_S / 10, 0.0)
    before = Device(cost).prefill(budget, 10_000)[-2][0]
    after = Device(cost, plain_s=2 * PLAIN_S).prefill(budget, 20_000)[-2][0]
    assert after == pytest.approx(2 * before, abs=2)


def test_other_load_on_the_machine_does_not_distort_chunks() -> None:
    draw = random.Random(3)
    busy = Device(busy=lambda: draw.choice([1.0, 1.0, 1.0, 1.3, 2.0]))
    budget = budget_for()
    busy.prefill(budget, 4000)
    steps = Device().prefill(budget, 500, cached=1000)
    assert all(MIN_AIM - 0.2 < ratio < LIMIT for size, ratio in steps[:-1] if size)


def test_the_target_falls_if_step_times_vary_and_rises_if_they_do_not() -> None:
    draw = random.Random(5)
    unsteady = Device(busy=lambda: draw.choice([1.0] * 9 + [2.5]))
    budget = budget_for()
    unsteady.prefill(budget, 4000)
    varied = [ratio for size, ratio in unsteady.prefill(budget, 2000) if size]
    assert statistics.median(varied) == pytest.approx(MIN_AIM, abs=0.3)
    budget = budget_for()
    steady = [ratio for _ in range(3) for size, ratio in Device().prefill(budget, 4000) if size]
    assert statistics.median(steady[-200:-1]) == pytest.approx(MAX_AIM, abs=0.3)
    assert max(steady) < LIMIT


def test_one_slow_step_changes_little() -> None:
    budget = budget_for()
    Device().prefill(budget, 1010)
    before = budget.chunk(1000, 1)
    budget.record_step(100 * PLAIN_S, budget._cost.seconds(before, 1000))
    assert before / 2 < budget.chunk(1000, 1) <= before


def test_a_chunk_never_becomes_too_small_to_be_efficient() -> None:
    """With a single decoding row, the fixed cost of a pass alone almost exceeds the budget."""
    device = Device(plain_s=0.04)
    steps = device.prefill(budget_for(), 4000)
    for (size, _), position in zip(steps, [sum(size for size, _ in steps[:i]) for i in range(len(steps))], strict=True):
        if size and position + size < 4000:
            assert 1.5 * SMALL.fixed <= SMALL.seconds(size + 1, position)
    assert max(ratio for _, ratio in steps) < 3


def test_chunks_stay_between_their_minimum_and_maximum() -> None:
    cheap, expensive = PrefillCost(0.0, PLAIN_S / 1000, 0.0), PrefillCost(0.0, PLAIN_S * 1000, 0.0)
    assert max(size for size, _ in Device(cheap).prefill(budget_for(cheap), 2000)) == MAX_CHUNK
    assert {size for size, _ in Device(expensive).prefill(budget_for(expensive), 100)} == {0, 1}


def test_prefill_pauses_regularly() -> None:
    sizes = [size for size, _ in Device().prefill(budget_for(), 4000)]
    assert sizes[:PAUSE] == [0] * PAUSE
    paused = [i for i, size in enumerate(sizes) if not size]
    assert [b - a for a, b in zip(paused[::PAUSE], paused[PAUSE::PAUSE], strict=False)] == [PAUSE_AFTER + PAUSE] * (
        len(paused) // PAUSE - 1
    )


DEEP = 29
"""Layers of a pass through a model of 30 layers."""


@pytest.mark.parametrize("lag", [0, 1])
def test_a_chunk_that_takes_too_long_runs_a_few_layers_per_step(lag: int) -> None:
    shallow = Device(lag=lag).prefill(budget_for(), 4000)
    steps = Device(lag=lag, layers=DEEP).prefill(budget_for(), 4000)
    assert max(ratio for _, ratio in steps) < LIMIT
    assert min(size for size, _ in steps[:-DEEP] if size) >= MAX_CHUNK / 2
    assert len(steps) < 0.7 * len(shallow)


@pytest.mark.parametrize("plain_s", [0.02, 0.04])
def test_a_pass_that_exceeds_the_limit_is_split_into_several_steps(plain_s: float) -> None:
    steps = Device(plain_s=plain_s, layers=DEEP).prefill(budget_for(), 2000)
    assert max(ratio for _, ratio in steps) < LIMIT


def test_a_chunk_shrinks_if_a_single_layer_takes_too_long() -> None:
    cost = PrefillCost(PLAIN_S / 100, PLAIN_S / 10, 0.0)
    steps = Device(cost, layers=2).prefill(budget_for(cost), 2000)[10:-1]
    assert max(ratio for _, ratio in steps) < LIMIT
    assert max(size for size, _ in steps) < MAX_CHUNK
    assert statistics.median(ratio for size, ratio in steps if size) > AIM - 0.2


@pytest.mark.parametrize("factor", [1 / 3, 3.0])
def test_the_budget_also_adapts_when_chunks_run_a_few_layers_per_step(factor: float) -> None:
    expected = PrefillCost(SMALL.fixed * factor, SMALL.token * factor, SMALL.attention * factor)
    steps = [ratio for size, ratio in Device(layers=DEEP).prefill(budget_for(expected), 4000) if size][40:-1]
    assert max(steps) < LIMIT
    assert statistics.fmean(steps) > AIM - 0.35


def test_steps_of_unknown_cost_are_not_used_as_a_measurement() -> None:
    budget = budget_for()
    Device().prefill(budget, 500)
    before = budget.chunk(500, 1)
    for _ in range(50):
        budget.record_step(PLAIN_S, 0.0)
        budget.record_step(1000.0, None)
    budget.record_step(1000.0, 0.05)
    assert budget.chunk(500, 1) == before
