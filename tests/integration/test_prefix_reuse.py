"""Jobs that reuse prefixes of earlier jobs generate the same text as without the prefix cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.record import Ending
from shared.jobs.request import Sampling
from shared.queue.claims import ClaimedJob
from tests.plugins.work import claimed
from tests.support import engine
from tests.support.runner import GREEDY, row, step
from worker.models.load import LoadedModel, load_model
from worker.runner.base import StepOutput
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

CHUNK = 16
SAMPLINGS = (
    GREEDY,
    Sampling(0.9, top_p=0.9, seed=3),
    Sampling(0.0, repetition_penalty=1.3),
    Sampling(1.1, top_k=50, seed=2**60),
)
SYSTEM = "You answer in few words and name your sources, whatever you are asked. " * 6
QUESTIONS = ("Why is the sky blue?", "Hi", "one two three " * 30)


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK, Memory(2**30, 2**28))


@pytest.fixture(scope="module")
def uncached(tiny: LoadedModel) -> MLXRunner:
    """A runner without a prefix cache."""
    return MLXRunner(tiny, CHUNK)


class Answer(NamedTuple):
    """The result of a job."""

    text: str
    ending: Ending

    @property
    def cached_tokens(self) -> int:
        return self.ending.cached_tokens

    @property
    def prompt_tokens(self) -> int:
        return self.ending.prompt_tokens


class Jobs:
    """Runs jobs on the model of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answer(self, runner: MLXRunner, jobs: Iterable[ClaimedJob], slots: int = 8) -> list[Answer]:
        """Submit all jobs at once and return their results."""
        sequences = [engine.sequence_of(self.folder, job, runner) for job in jobs]
        texts = engine.run(runner, sequences, slots)
        return [Answer(texts[each], each.ending) for each in sequences if each.ending is not None]


@pytest.fixture(scope="module")
def jobs(tiny_model_path: Path) -> Jobs:
    return Jobs(tiny_model_path)


def ask(question: str, sampling: Sampling, owner: str = "me", **more: object) -> ClaimedJob:
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": question})
    return claimed(question, owner=owner, sampling=sampling, max_tokens=24, messages=messages, **more)


def with_stop(job: ClaimedJob, stop: str) -> ClaimedJob:
    return replace(job, request=replace(job.request, stop=(stop,)))


def summary(answers: Iterable[Answer]) -> list[tuple[object, ...]]:
    return [(text, end.finish_reason, end.prompt_tokens, end.completion_tokens) for text, end in answers]


def test_cached_prefixes_change_no_answer_of_single_or_batched_jobs(
    jobs: Jobs, runner: MLXRunner, uncached: MLXRunner
) -> None:
    plain = [ask(question, sampling) for question in QUESTIONS for sampling in SAMPLINGS]
    texts = [jobs.answer(uncached, [job])[0].text for job in plain]
    requests = [*plain, *(with_stop(job, text[9:12]) for job, text in zip(plain, texts, strict=True))]
    expected = summary(jobs.answer(uncached, [job])[0] for job in requests)
    assert {finish_reason for _, finish_reason, *_ in expected} == {"length", "stop"}
    single = [jobs.answer(runner, [job])[0] for job in requests]
    together = jobs.answer(runner, requests)
    in_pairs = jobs.answer(runner, reversed(requests), slots=2)
    assert summary(single) == summary(together) == summary(reversed(in_pairs)) == expected
    assert single[0].cached_tokens == 0
    assert all(80 < each.cached_tokens < each.prompt_tokens for each in (*single[1:], *together, *in_pairs))
    assert all(each.cached_tokens == each.prompt_tokens - 1 for each in together)


def test_simultaneous_jobs_reuse_the_prefix_of_the_first(jobs: Jobs, runner: MLXRunner, uncached: MLXRunner) -> None:
    requests = [ask(f"{i} {QUESTIONS[i % 3]}", GREEDY) for i in range(12)]
    answers = jobs.answer(runner, requests, slots=12)
    assert summary(answers) == summary(jobs.answer(uncached, requests, slots=12))
    assert [each.cached_tokens > 0 for each in answers] == [False] + [True] * 11


def test_owners_do_not_reuse_prefixes_of_each_other(jobs: Jobs, runner: MLXRunner) -> None:
    mine, yours = ask("Hi", GREEDY), ask("Hi", GREEDY, owner="you")
    first, second, third = (jobs.answer(runner, [job])[0] for job in (mine, yours, yours))
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    assert third.cached_tokens > 0


def test_other_owners_reuse_only_the_shared_system_message(jobs: Jobs, runner: MLXRunner, uncached: MLXRunner) -> None:
    mine, yours = ask("Why is the sky blue?", GREEDY), ask("Why is the sky blue?", GREEDY, owner="you")
    shared = ask("Why is the sky blue?", GREEDY, share_system_prompt=True)
    prompt = engine.tokenized(jobs.folder, shared)
    assert 80 < prompt.shared < len(prompt.tokens) - 5
    assert engine.tokenized(jobs.folder, mine).shared == 0
    jobs.answer(runner, [mine])
    assert jobs.answer(runner, [yours])[0].cached_tokens == 0
    runner.reset()
    jobs.answer(runner, [shared])
    (answer,) = jobs.answer(runner, [yours])
    assert answer.cached_tokens == prompt.shared
    assert summary([answer]) == summary(jobs.answer(uncached, [yours]))


def test_preempted_rows_continue_with_the_same_tokens(jobs: Jobs, tiny: LoadedModel, uncached: MLXRunner) -> None:
    """Three rows of the expected length of 440 tokens fit into the memory, but not three rows of 500."""
    requests = [claimed(f"{i} " + "long " * 170, max_tokens=330, sampling=each) for i, each in enumerate(SAMPLINGS[:3])]
    expected = summary(jobs.answer(uncached, requests))
    probe = MLXRunner(tiny, CHUNK)
    limit = (probe.batch_bytes([440] * 3) + probe.batch_bytes([500] * 3)) // 2
    limited = MLXRunner(tiny, CHUNK, Memory(limit, 2**18))
    inserted: list[int] = []
    insert = limited.insert
    limited.insert = lambda rows: (inserted.extend(each.uid for each in rows), insert(rows))[1]  # type: ignore[method-assign]
    assert summary(jobs.answer(limited, requests)) == expected
    assert len(inserted) > len(set(inserted)) == 3, "no row was preempted"


class Rows:
    """Rows of one owner in a runner, and their tokens."""

    def __init__(self, runner: MLXRunner) -> None:
        self.runner = runner
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.reused: dict[int, int] = {}
        self._last_uid = 0

    def insert(
        self, prompt: tuple[int, ...], max_new_tokens: int, sampling: Sampling = GREEDY, generated: int = 0
    ) -> int:
        self._last_uid += 1
        inserted = row(self._last_uid, prompt, max_new_tokens, sampling, "me")
        self.runner.insert([replace(inserted, generated=generated)])
        return self._last_uid

    def step(self) -> StepOutput:
        output = step(self.runner)
        self.reused.update(output.prefilled)
        for each in output.tokens:
            self.tokens[each.uid].append(each.token)
        return output

    def finish(self, uid: int, count: int) -> list[int]:
        """Step until a row has `count` tokens, and remove it."""
        while len(self.tokens[uid]) < count:
            self.step()
        self.runner.remove([uid])
        return self.tokens[uid]


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple((i * 131) % 40_000 + 100 for i in range(length))


@pytest.mark.parametrize("answer", [1, 2, 20])
def test_the_next_turn_of_a_conversation_reuses_the_answer(runner: MLXRunner, uncached: MLXRunner, answer: int) -> None:
    rows, reference = Rows(runner), Rows(uncached)
    first = prompt_of(50)
    tokens = rows.finish(rows.insert(first, answer), answer)
    second = (*first, *tokens, 7, 8, 9)
    uid = rows.insert(second, 12)
    assert rows.finish(uid, 12) == reference.finish(reference.insert(second, 12), 12)
    assert rows.reused[uid] == 50 + answer - 1, "the last token of the answer was never an input"


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_that_was_removed_at_any_stage_continues_from_its_prefix(
    tiny: LoadedModel, uncached: MLXRunner, sampling: Sampling
) -> None:
    prompt, limit = prompt_of(5 * CHUNK), 12
    reference = Rows(uncached)
    expected = reference.finish(reference.insert(prompt, limit, sampling), limit)
    for steps in range(1, 14):
        runner = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28))
        rows = Rows(runner)
        rows.insert(prompt_of(9)[::-1], 100)
        removed = rows.insert(prompt, limit, sampling)
        for _ in range(steps):
            rows.step()
        runner.remove([removed])
        tokens = rows.tokens[removed]
        resumed = rows.insert((*prompt, *tokens), limit - len(tokens), sampling, generated=len(tokens))
        assert [*tokens, *rows.finish(resumed, limit - len(tokens))] == expected
        if tokens:  # the step that was queued at the removal had all these tokens as input
            assert rows.reused[resumed] == len(prompt) + len(tokens) - 1
        elif steps > 4:
            assert rows.reused[resumed] >= CHUNK


def test_a_prefix_that_is_evicted_before_the_prefill_is_recomputed(runner: MLXRunner) -> None:
    rows = Rows(runner)
    expected = rows.finish(rows.insert(prompt_of(20 * CHUNK), 5), 5)
    again = rows.insert(prompt_of(20 * CHUNK), 5)
    runner._prefixes.clear()
    prefilled = []
    while len(rows.tokens[again]) < 5:
        prefilled.append(rows.step().prompt_tokens)
    assert rows.tokens[again] == expected
    assert max(prefilled) < 2 * CHUNK, "the prompt was prefilled at once, as if the prefix were still cached"


def test_reset_drops_prefixes(runner: MLXRunner) -> None:
    rows = Rows(runner)
    rows.finish(rows.insert(prompt_of(50), 5), 5)
    assert runner.stats()["prefix_cache_bytes"] > 0
    runner.reset()
    assert runner.stats()["prefix_cache_bytes"] == 0


def test_prefixes_are_evicted_when_rows_need_the_memory(tiny: LoadedModel, jobs: Jobs) -> None:
    runner = MLXRunner(tiny, CHUNK, Memory(2**21, 2**21))
    stored: list[float] = []
    for i in range(8):
        jobs.answer(runner, [claimed(f"{i} " + "word " * 400, max_tokens=2)])
        stored.append(runner.stats()["prefix_cache_bytes"])
    during: list[float] = []
    execute = runner.execute
    runner.execute = lambda plan: (during.append(runner.stats()["prefix_cache_bytes"]), execute(plan))[1]  # type: ignore[method-assign]
    jobs.answer(runner, [claimed("other " * 2800, max_tokens=50)])
    assert 0 < during[0] < stored[-1]


@pytest.mark.slow
def test_a_real_conversation_prefills_only_new_tokens(smollm2_path: Path) -> None:
    model, jobs = load_model(smollm2_path), Jobs(smollm2_path)
    runner, uncached = MLXRunner(model, 32, Memory(2**32, 2**30)), MLXRunner(model, 32)
    messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    known = 0
    for question in ("What is the capital of France?", "And of Spain?", "Which of them is larger?"):
        messages.append({"role": "user", "content": question})
        turn = claimed(question, sampling=GREEDY, max_tokens=16, messages=tuple(messages))
        (answer,), (expected,) = jobs.answer(runner, [turn]), jobs.answer(uncached, [turn])
        assert summary([answer]) == summary([expected])
        assert answer.cached_tokens >= known
        messages.append({"role": "assistant", "content": answer.text})
        known = answer.prompt_tokens + answer.ending.completion_tokens - 1
    assert "Paris" in messages[2]["content"]


def test_after_a_long_cached_prefix_the_rest_is_prefilled_in_one_step(runner: MLXRunner) -> None:
    shared = prompt_of(2000)
    prefilled = []
    for i in range(2):
        runner.insert([row(i, (*shared, *range(100 + i, 120 + i)), 1, owner="me")])
        steps: list[StepOutput] = []
        while not steps or not steps[-1].tokens:
            steps.append(step(runner))
        runner.remove([i])
        prefilled.append(sum(each.prompt_tokens for each in steps))
    assert prefilled == [2019, 19]
    assert steps[-1].prefilled == {1: 2000}
    assert len(steps) <= 3
