"""The prefill policy: which prompts are prefilled together, in which order, and how much of them per step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest

from worker.engine.prefill_budget import AIM, PAUSE, PrefillBudget
from worker.engine.prefill_policy import (
    ALONE_CHUNKS,
    BATCH_PASSES,
    MAX_SHORT_PROMPTS,
    SHORT_CHUNKS,
    SHORT_PASSES,
    SHORT_S,
    TOGETHER_S,
    PrefillPolicy,
)
from worker.runner.base import EncodeWork, PrefillWork, RemainingPrompt, StepPlan
from worker.runner.cost import PrefillCost

CHUNK, DEPTH = 16, 8
TOKENS = PrefillCost(1e-9, 1.0, 0.0)
"""A cost of about one second per token."""


class Prompts:
    """Waiting prompts as a runner reports them, with a policy that plans their prefill.

    Args:
        seconds: time for prefill per step.
    """

    def __init__(self, seconds: float = 20.0, cost: PrefillCost = TOKENS, depth: int = DEPTH) -> None:
        self.budget = PrefillBudget(CHUNK, cost)
        for _ in range(9):
            self.budget.record_step(seconds / (AIM - 1), 0.0)
        for _ in range(PAUSE):
            assert self.budget.pauses()
        self.policy = PrefillPolicy(CHUNK, depth, cost, self.budget)
        self.remaining: dict[int, RemainingPrompt] = {}
        self.layers = self.depth = depth

    def add(self, uid: int, tokens: int, cached: int = 0) -> None:
        self.remaining[uid] = RemainingPrompt(tokens, cached)

    def plan(self, image_s: float | None = None, *, decoding: bool = True, exclusive: tuple[int, ...] = ()) -> StepPlan:
        """Plan a step and execute the plan."""
        plan = self.policy.plan(self.remaining, image_s, decoding=decoding, exclusive=exclusive)
        if plan.prefill is not None:
            self._prefill(plan.prefill)
        return plan

    def _prefill(self, work: PrefillWork) -> None:
        if work.tokens is None:
            self.remaining = {uid: remaining for uid, remaining in self.remaining.items() if uid not in work.uids}
            return
        (uid,) = work.uids
        remaining = self.remaining[uid]
        size = remaining.in_progress or work.tokens
        layers = self.layers if remaining.in_progress else self.depth
        assert 0 < size <= remaining.tokens or remaining.tokens == 0
        if work.layers is not None and work.layers < layers:
            self.remaining[uid], self.layers = (
                RemainingPrompt(remaining.tokens, remaining.position, size),
                layers - work.layers,
            )
        elif size < remaining.tokens:
            self.remaining[uid] = RemainingPrompt(remaining.tokens - size, remaining.position + size)
        else:
            del self.remaining[uid]

    def order(self, *, decoding: bool = True) -> list[tuple[int, ...]]:
        """Prefill all prompts. Returns the uids of each step, without repetitions of the previous step."""
        steps: list[tuple[int, ...]] = []
        while self.remaining:
            work = self.plan(decoding=decoding).prefill
            steps += [work.uids] if work is not None else []
            assert len(steps) < 1000
        return [step for step, after in pairwise([*steps, ()]) if step != after]


@pytest.fixture
def prompts() -> Prompts:
    return Prompts()


def test_short_prompts_do_not_wait_for_long_ones(prompts: Prompts) -> None:
    for uid, tokens in enumerate((40 * CHUNK, 40 * CHUNK, CHUNK, CHUNK, CHUNK), 1):
        prompts.add(uid, tokens)
    assert prompts.order() == [(3, 4, 5), (1,), (2,)]


def test_a_long_prompt_does_not_starve_while_short_ones_arrive(prompts: Prompts) -> None:
    prompts.add(0, 5 * CHUNK)
    for steps in range(1, 50):
        prompts.add(steps, CHUNK)
        prompts.plan()
        if 0 not in prompts.remaining:
            break
    assert steps < 14


@pytest.mark.parametrize("decoding", [False, True])
def test_simultaneous_short_prompts_are_prefilled_together(prompts: Prompts, decoding: bool) -> None:
    for uid in range(2 * MAX_SHORT_PROMPTS):
        prompts.add(uid, CHUNK)
    assert [len(uids) for uids in prompts.order(decoding=decoding)] == [MAX_SHORT_PROMPTS, MAX_SHORT_PROMPTS]


def test_prompts_of_very_different_total_length_are_prefilled_separately(prompts: Prompts) -> None:
    prompts.add(1, CHUNK)
    prompts.add(2, CHUNK, cached=100 * CHUNK)
    prompts.add(3, CHUNK, cached=101 * CHUNK)
    assert prompts.order() == [(1,), (2, 3)]


def test_a_few_tokens_after_a_long_prefix_can_count_as_a_long_prompt() -> None:
    prompts = Prompts(cost=PrefillCost(0.0, 1.0, 0.1))
    prompts.add(2, 4, cached=200)
    prompts.add(3, 5)
    assert prompts.order() == [(3,), (2,)]


def test_a_fully_cached_prompt_is_treated_as_short(prompts: Prompts) -> None:
    prompts.add(1, 0, cached=1)
    assert prompts.plan().prefill == PrefillWork((1,))


def test_the_rest_of_a_long_prompt_is_not_prefilled_together_with_short_ones(prompts: Prompts) -> None:
    prompts.add(1, (ALONE_CHUNKS + SHORT_CHUNKS) * CHUNK)
    prompts.plan(decoding=False)
    assert prompts.remaining[1].tokens == SHORT_CHUNKS * CHUNK
    prompts.add(2, CHUNK)
    assert {len(uids) for uids in prompts.order(decoding=False)} == {1}


def test_rows_marked_as_alone_are_prefilled_separately(prompts: Prompts) -> None:
    for uid in range(3):
        prompts.add(uid, CHUNK)
    steps = [prompts.plan(exclusive=(1,)).prefill for _ in range(2)]
    assert {work.uids for work in steps if work} == {(0, 2), (1,)}


def test_a_long_prompt_is_prefilled_in_longer_chunks_while_nothing_decodes(prompts: Prompts) -> None:
    prompts.add(1, 40 * CHUNK)
    assert {prompts.plan(decoding=False).prefill for _ in range(9)} == {PrefillWork((1,), ALONE_CHUNKS * CHUNK)}


def test_while_rows_decode_a_chunk_runs_as_many_layers_as_fit_into_the_budget() -> None:
    prompts = Prompts(seconds=3.1 / 8, cost=PrefillCost(1.0, 1e-9, 0.0))
    prompts.add(1, 40 * CHUNK)
    works = [prompts.plan().prefill for _ in range(9)]
    assert {(work.tokens, work.layers) for work in works if work} == {(CHUNK, 3)}


def test_the_rest_of_a_chunk_takes_one_step_once_nothing_decodes() -> None:
    prompts = Prompts(seconds=3.1 / 8, cost=PrefillCost(1.0, 1e-9, 0.0))
    prompts.add(1, 40 * CHUNK)
    prompts.plan()
    assert prompts.remaining[1].in_progress == CHUNK
    work = prompts.plan(decoding=False).prefill
    assert work is not None and work.layers is None
    assert prompts.remaining[1] == RemainingPrompt(39 * CHUNK, CHUNK)


def test_long_prompts_pause_regularly_and_short_ones_do_not(prompts: Prompts) -> None:
    prompts.add(1, 400 * CHUNK)
    works = [prompts.plan().prefill for _ in range(54)]
    assert works.count(None) == 6
    while prompts.plan().prefill is not None:
        pass
    prompts.add(2, CHUNK)
    assert prompts.plan().prefill == PrefillWork((2,))


def test_the_next_long_prompt_starts_when_the_current_one_is_removed(prompts: Prompts) -> None:
    prompts.add(1, 40 * CHUNK)
    prompts.add(2, 40 * CHUNK)
    prompts.plan()
    del prompts.remaining[1]
    work = prompts.plan().prefill
    assert work is not None and work.uids == (2,)


def test_images_and_prompts_take_turns(prompts: Prompts) -> None:
    prompts.add(1, 40 * CHUNK)
    plans = [prompts.plan(image_s=1.0, decoding=False) for _ in range(6)]
    assert [plan.encode is not None for plan in plans] == [True, False] * 3
    assert [plan.prefill is not None for plan in plans] == [False, True] * 3


def test_a_large_image_gets_the_budget_and_a_small_one_is_encoded_whole(prompts: Prompts) -> None:
    assert prompts.plan(image_s=100.0).encode == EncodeWork(pytest.approx(20.0))
    assert prompts.plan(image_s=SHORT_S).encode == EncodeWork()
    assert prompts.plan(image_s=100.0, decoding=False).encode == EncodeWork()


def test_no_large_image_is_encoded_in_a_pause(prompts: Prompts) -> None:
    plans = [prompts.plan(image_s=100.0) for _ in range(54)]
    assert plans.count(StepPlan()) == 6


def test_short_prompts_are_prefilled_in_the_step_that_encodes_an_image(prompts: Prompts) -> None:
    prompts.add(1, CHUNK)
    assert prompts.plan(image_s=100.0) == StepPlan(PrefillWork((1,)), EncodeWork(pytest.approx(20.0)))


def test_a_long_prompt_waits_for_one_image_even_if_short_prompts_keep_coming(prompts: Prompts) -> None:
    prompts.add(1, 400 * CHUNK)
    works = []
    for uid in range(2, 8):
        prompts.add(uid, CHUNK)
        works.append(prompts.plan(image_s=1.0, decoding=False).prefill)
    assert [work.uids for work in works if work] == [(2,), (1,), (3, 4), (1,), (5, 6), (1,)]


def test_prompts_of_one_pass_are_short_together() -> None:
    prompts = Prompts(cost=PrefillCost(0.0, TOGETHER_S / CHUNK / 20, 0.0))
    for uid in range(6):
        prompts.add(uid, 10 * CHUNK)
    assert prompts.order() == [(0, 1), (2, 3), (4, 5)]


def test_a_prompt_is_short_if_splitting_it_would_cost_more_than_it_saves() -> None:
    prompts = Prompts(cost=PrefillCost(fixed=10.0, token=0.5, attention=0.0))
    for uid, tokens in enumerate((2 * SHORT_PASSES * 5, 2 * SHORT_PASSES * 10)):
        prompts.add(uid, tokens)
    assert prompts.plan().prefill == PrefillWork((0,))
    assert prompts.plan().prefill != PrefillWork((1,))


def test_draft_tokens_are_verified_only_if_there_is_no_other_work(prompts: Prompts) -> None:
    nothing: Mapping[int, RemainingPrompt] = {}
    assert prompts.policy.plan(nothing, None, decoding=True) == StepPlan(speculate=True)
    prompts.add(1, 400 * CHUNK)
    assert not any(prompts.plan().speculate for _ in range(40))


def test_prompts_of_the_batch_take_few_tokens_per_pass(prompts: Prompts) -> None:
    size = CHUNK // BATCH_PASSES // 2
    for uid in range(1, 6):
        prompts.add(uid, size if uid < 5 else 2 * CHUNK)
    plans = [prompts.policy.plan(prompts.remaining, None, decoding=True, batch=batch) for batch in (True, False)]
    assert [plan.prefill.uids for plan in plans if plan.prefill] == [(1, 2), (1, 2, 3, 4, 5)]
    only_long = {5: prompts.remaining[5]}
    plan = prompts.policy.plan(only_long, None, decoding=True, batch=True)
    assert plan.prefill is not None and plan.prefill.uids == (5,)
