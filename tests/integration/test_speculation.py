"""Speculative decoding: drafts never change the text, and unprofitable drafts are not verified."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.jobs.log import EventKind
from shared.jobs.request import Sampling
from tests.plugins.stack import Stack
from tests.support.drafting import answers, counts, drafting, every_fifth, run
from tests.support.runner import GREEDY, numbered, resumed, row, step
from tests.support.waiting import eventually
from worker.models.load import LoadedModel, load_model
from worker.runner import forward
from worker.runner.kv_cache import KVCache
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.speculation.pass_cost import LENGTHS, PassCost
from worker.runner.speculation.verification import MAX_ROWS

CHUNK = 16
SAMPLINGS = (GREEDY, Sampling(1.0, seed=11), Sampling(0.8, top_p=0.9, seed=2**63), Sampling(1.2, top_k=40, seed=-5))
PENALISED = Sampling(0.0, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def plain(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK)


@pytest.fixture
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK, Memory(2**30, 2**28), speculation_tokens=16)


@pytest.mark.parametrize("wrong", [lambda _: False, every_fifth, lambda _: True], ids=["right", "mixed", "wrong"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_drafts_change_no_token(
    plain: MLXRunner, runner: MLXRunner, sampling: Sampling, wrong: Callable[[int], bool]
) -> None:
    one = numbered(1, 21, 60, sampling)
    expected = answers(plain, [one])
    with drafting([one], expected, wrong):
        assert run(runner, [one]) == expected
    drafted, accepted = counts(runner)
    assert drafted > 50
    kinds = {wrong(index) for index in range(9)}
    assert (accepted == drafted, accepted == 0) == (kinds == {False}, kinds == {True})


def test_accepted_drafts_save_steps(plain: MLXRunner, runner: MLXRunner) -> None:
    one = numbered(1, 21, 120)
    expected = answers(plain, [one])
    with drafting([one], expected, lambda _: False):
        runner.insert([one])
        outputs = [step(runner) for _ in range(40)]
    assert max(len(output.tokens) for output in outputs) == 17
    assert {output.verified for output in outputs if len(output.tokens) > 1} == {True}
    assert not step(runner).tokens


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 17, 18, 19, 20])
def test_a_row_never_exceeds_its_token_limit(plain: MLXRunner, runner: MLXRunner, limit: int) -> None:
    one = numbered(1, 9, limit)
    expected = answers(plain, [one])
    longer = answers(plain, [replace(one, max_new_tokens=60)])
    with drafting([one], longer, every_fifth):
        assert run(runner, [one]) == expected
    assert runner.stats()["kv_bytes"] == 0


def test_a_few_rows_are_verified_together_while_rows_join_and_leave(plain: MLXRunner, runner: MLXRunner) -> None:
    """The rows have different lengths and sampling options, and each accepts its own number of draft tokens."""
    rows = [numbered(uid, 5 + 9 * uid, 20 + 7 * uid, SAMPLINGS[uid % 4]) for uid in range(8)]
    expected = answers(plain, rows)
    late = {3: rows[2:3], 5: rows[3:4], 9: rows[4:5], 12: rows[5:7], 14: rows[7:]}
    with drafting(rows, expected, lambda index: index % 7 in (2, 3)):
        assert run(runner, rows[:2], late) == expected
    drafted, accepted = counts(runner)
    assert 0 < accepted < drafted


def test_no_drafts_are_verified_for_more_than_a_few_rows(plain: MLXRunner, runner: MLXRunner) -> None:
    rows = [numbered(uid, 9, 12) for uid in range(MAX_ROWS + 1)]
    expected = answers(plain, rows)
    with drafting(rows, expected, every_fifth):
        assert run(runner, rows) == expected
    assert counts(runner) == (0, 0)


def test_no_drafts_are_verified_while_a_row_uses_penalties(plain: MLXRunner, runner: MLXRunner) -> None:
    rows = [numbered(1, 9, 30, PENALISED), numbered(2, 9, 20)]
    expected = answers(plain, rows)
    with drafting(rows, expected, every_fifth):
        assert run(runner, rows) == expected
    assert counts(runner) == (0, 0)


def test_no_drafts_are_verified_during_a_prefill(plain: MLXRunner, runner: MLXRunner) -> None:
    rows = [numbered(1, 9, 200), numbered(2, 40 * CHUNK, 5)]
    expected = answers(plain, rows)
    with drafting(rows, expected, every_fifth):
        runner.insert(rows[:1])
        tokens = [each.token for _ in range(5) for each in step(runner).tokens]
        runner.insert(rows[1:])
        while not (output := step(runner)).prefilled:
            tokens += [each.token for each in output.tokens]
            assert len(output.tokens) <= 1
        tokens += [each.token for each in output.tokens if each.uid == 1]
        while len(tokens) < 200:
            tokens += [each.token for each in step(runner).tokens if each.uid == 1]
    assert tokens == expected[1]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_a_resumed_row_continues_with_the_same_tokens(plain: MLXRunner, runner: MLXRunner, sampling: Sampling) -> None:
    one = numbered(0, 9, 40, sampling)
    tokens = answers(plain, [one])[0]
    for each in (resumed(one, cut, tokens[:cut]) for cut in range(1, 30)):
        rest = {each.uid: tokens[each.uid :]}
        with drafting([each], rest, every_fifth):
            assert run(runner, [each]) == rest


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_prefix_of_a_removed_row_holds_exactly_its_tokens(
    plain: MLXRunner, runner: MLXRunner, tiny: LoadedModel, steps: int
) -> None:
    one = numbered(1, 30, 150, owner="me")
    expected = answers(plain, [one])
    with drafting([one], expected, every_fifth):
        runner.insert([one])
        tokens = [each.token for _ in range(steps) for each in step(runner).tokens]
        runner.remove([1])
    assert tokens == expected[1][: len(tokens)]
    assert runner.stats()["kv_bytes"] == 0
    text = (*one.prompt, *expected[1])
    length, loaded = runner._prefixes.load("me", text)
    assert length in {len(one.prompt) - 1, len(one.prompt) + len(tokens) - 1, len(one.prompt) + len(tokens)}
    fresh = KVCache.empty(tiny.model)
    forward.fill(tiny.model, fresh, [text[:length]])
    for arrays, expected_arrays in zip(loaded.copy_columns(0, length), fresh.copy_columns(0, length), strict=True):
        for array, expected_array in zip(arrays, expected_arrays, strict=True):
            assert mx.allclose(array, expected_array, rtol=1e-3, atol=1e-5)
    again = replace(one, uid=2, prompt=(*text[:length], 7, 8), max_new_tokens=9)
    assert run(runner, [again])[2] == run(plain, [replace(again, owner=None)])[2]


def test_repetitions_of_the_prompt_are_drafted_and_accepted(tiny: LoadedModel) -> None:
    model = ScriptedModel(tiny, lambda token: 100 + (token - 99) % 60)
    runner = model.runner()
    runner._speculation.cost = cost(0.1)
    tokens = run(runner, [row(1, (*range(100, 160), 100), 300)])[1]
    assert tokens == [101 + (i % 60) for i in range(59)] + [100 + (i % 60) for i in range(241)]
    drafted, accepted = counts(runner)
    assert accepted > 200
    assert model.passes < 80
    assert drafted - accepted < 30


class ScriptedModel:
    """The tiny model with a fixed successor for each token. Counts its passes and the tokens in them."""

    def __init__(self, tiny: LoadedModel, successor: Callable[[int], int]) -> None:
        self.passes = self.tokens = 0
        self._tiny = tiny
        self._successor = successor

    def runner(self) -> MLXRunner:
        return MLXRunner(replace(self._tiny, model=self), CHUNK, speculation_tokens=16)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        logits = self._tiny.model(tokens, cache=cache)
        self.passes += 1
        self.tokens += tokens.shape[1]
        following = [[self._successor(token) for token in row] for row in cast("list[list[int]]", tokens.tolist())]
        return mx.put_along_axis(mx.zeros_like(logits), mx.array(following)[:, :, None], mx.array(1.0), axis=-1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tiny.model, name)


def cost(additional_token: float) -> PassCost:
    """Return a cost of 1 per pass of one token, plus a cost per additional token."""
    return PassCost({1: 1.0, 17: 1.0 + 16 * additional_token})


def test_drafts_that_cost_as_much_as_they_save_are_not_verified(tiny: LoadedModel) -> None:
    runner = ScriptedModel(tiny, lambda token: 100 + (token - 99) % 60).runner()
    runner._speculation.cost = cost(1.0)
    run(runner, [row(1, (*range(100, 160), 100), 300)])
    assert counts(runner) == (0, 0)


def test_wrong_drafts_cost_little(tiny: LoadedModel) -> None:
    """A pair of tokens repeats again and again, and a different token follows it each time."""
    text = iter(token for i in range(5000) for token in (50, 51, 1000 + i))
    following: dict[int, int] = {}

    def successor(token: int) -> int:
        return following.setdefault(token, next(text)) if token >= 1000 else {50: 51}.get(token, 1000 + len(following))

    model = ScriptedModel(tiny, successor)
    runner = model.runner()
    runner._speculation.cost = cost(0.2)
    run(runner, [row(1, tuple(range(100, 160)), 1200)])
    total = model.passes + 0.2 * (model.tokens - model.passes - 60)
    assert total < 12 + 1200 * 1.02


def test_the_cost_of_passes_is_measured_during_warm_up(runner: MLXRunner) -> None:
    runner.warm()
    measured = runner._speculation.cost
    assert set(measured.seconds) == {1, *(1 + length for length in LENGTHS)}
    assert min(measured.seconds.values()) > 0
    assert counts(runner) == (0, 0)
    assert runner.stats()["kv_bytes"] == 0


def test_no_drafts_are_verified_while_a_row_asks_for_log_probabilities(plain: MLXRunner, runner: MLXRunner) -> None:
    one = numbered(1, 9, 30)
    expected = answers(plain, [one])
    with drafting([one], expected, lambda _: False):
        assert run(runner, [replace(one, request=replace(one.request, logprobs=2))]) == expected
    assert counts(runner) == (0, 0)


def test_without_speculation_tokens_nothing_is_drafted(tiny: LoadedModel) -> None:
    runner = MLXRunner(tiny, CHUNK)
    runner.warm()
    run(runner, [row(1, (*range(100, 160), 100), 50)])
    assert counts(runner) == (0, 0)


TEXT = (
    "On Monday morning Anna walked down to the harbour, bought two loaves of bread, a jar of honey and a newspaper, "
    "and sat on the old stone wall to wait for the ferry. The sea was quiet, the gulls were loud, and the ferry was "
    "late, as it had been every Monday since the spring."
)


def stat(stack: Stack, name: str) -> float:
    return sum(worker.stats.get(name, 0) for worker in stack.ready_workers())


@pytest.mark.long
def test_texts_of_a_killed_worker_continue_as_without_speculation(smollm2_api: Stack) -> None:
    stack = smollm2_api
    question = {"role": "user", "content": f"Repeat this text word for word: {TEXT}"}
    bodies = [{"messages": [question], "temperature": t, "seed": 3, "max_tokens": 70} for t in (0, 0.3)]
    with stack.client() as client:
        first = stack.start_worker(SPECULATION_TOKENS="0")
        references = [client.submit(body).id for body in bodies]
        eventually(lambda: all(client.job(job).status.terminal for job in references), "the jobs end", 60)
        expected = [client.job(job) for job in references]
        assert stat(stack, "speculation_drafted_tokens_total") == 0
        stack.stop(first)
        second = stack.start_worker()
        jobs = [client.submit(body).id for body in bodies]
        for event in client.events(jobs[1]):
            if event.n > 4 and event.text and second.poll() is None:
                assert stack.stop(second, signal.SIGKILL) == -signal.SIGKILL
                stack.start_worker()
        eventually(lambda: all(client.job(job).status.terminal for job in jobs), "the jobs end", 60)
        eventually(lambda: stat(stack, "speculation_accepted_tokens_total") > 10, "drafts are accepted", 10)
        for job, reference in zip(map(client.job, jobs), expected, strict=True):
            events = list(client.events(job.id))
            assert EventKind.RESUMED in {event.kind for event in events}
            assert job.text == "".join(event.text for event in events) == reference.text
            assert job.usage["completion_tokens"] == reference.usage["completion_tokens"]
