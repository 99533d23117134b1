"""Jobs that begin with what earlier ones left in the cache say what they would have said without it."""

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
def forgetful(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK)


class Answer(NamedTuple):
    """How a job ended."""

    text: str
    ending: Ending

    @property
    def cached_tokens(self) -> int:
        return self.ending.cached_tokens

    @property
    def prompt_tokens(self) -> int:
        return self.ending.prompt_tokens


class Jobs:
    """Runs jobs on the model in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answer(self, runner: MLXRunner, jobs: Iterable[ClaimedJob], slots: int = 8) -> list[Answer]:
        """How an engine ends these jobs, which come at once."""
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


def facts(answers: Iterable[Answer]) -> list[tuple[object, ...]]:
    return [(text, end.finish_reason, end.prompt_tokens, end.completion_tokens) for text, end in answers]


def test_answers_are_the_same_with_and_without_alone_and_together(
    jobs: Jobs, runner: MLXRunner, forgetful: MLXRunner
) -> None:
    plain = [ask(question, sampling) for question in QUESTIONS for sampling in SAMPLINGS]
    texts = [jobs.answer(forgetful, [job])[0].text for job in plain]
    asked = [*plain, *(with_stop(job, text[9:12]) for job, text in zip(plain, texts, strict=True))]
    expected = facts(jobs.answer(forgetful, [job])[0] for job in asked)
    assert {fact[1] for fact in expected} == {"length", "stop"}
    alone = [jobs.answer(runner, [job])[0] for job in asked]
    together = jobs.answer(runner, asked)
    in_pairs = jobs.answer(runner, reversed(asked), slots=2)
    assert facts(alone) == facts(together) == facts(reversed(in_pairs)) == expected
    assert alone[0].cached_tokens == 0
    assert all(80 < each.cached_tokens < each.prompt_tokens for each in (*alone[1:], *together, *in_pairs))
    assert all(each.cached_tokens == each.prompt_tokens - 1 for each in together)


def test_those_that_come_at_once_profit_from_the_first_of_them(
    jobs: Jobs, runner: MLXRunner, forgetful: MLXRunner
) -> None:
    asked = [ask(f"{i} {QUESTIONS[i % 3]}", GREEDY) for i in range(12)]
    answers = jobs.answer(runner, asked, slots=12)
    assert facts(answers) == facts(jobs.answer(forgetful, asked, slots=12))
    assert [each.cached_tokens > 0 for each in answers] == [False] + [True] * 11


def test_keys_profit_from_themselves_only(jobs: Jobs, runner: MLXRunner) -> None:
    mine, yours = ask("Hi", GREEDY), ask("Hi", GREEDY, owner="you")
    first, second, third = (jobs.answer(runner, [job])[0] for job in (mine, yours, yours))
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    assert third.cached_tokens > 0


def test_a_shared_system_message_serves_other_keys_and_only_that(
    jobs: Jobs, runner: MLXRunner, forgetful: MLXRunner
) -> None:
    mine, yours = ask("Why is the sky blue?", GREEDY), ask("Why is the sky blue?", GREEDY, owner="you")
    shared = ask("Why is the sky blue?", GREEDY, share_system_prompt=True)
    prompt = engine.tokenized(jobs.folder, shared)
    assert 80 < (given := prompt.shared) < len(prompt.tokens) - 5
    assert engine.tokenized(jobs.folder, mine).shared == 0
    jobs.answer(runner, [mine])
    assert jobs.answer(runner, [yours])[0].cached_tokens == 0
    runner.reset()
    jobs.answer(runner, [shared])
    (answer,) = jobs.answer(runner, [yours])
    assert answer.cached_tokens == given
    assert facts([answer]) == facts(jobs.answer(forgetful, [yours]))


def test_rows_that_are_preempted_continue_as_if_they_had_not_been(
    jobs: Jobs, tiny: LoadedModel, forgetful: MLXRunner
) -> None:
    """Three rows of 440 tokens fit into the memory, which they are expected to reach, and not three of 500."""
    asked = [claimed(f"{i} " + "long " * 170, max_tokens=330, sampling=each) for i, each in enumerate(SAMPLINGS[:3])]
    expected = facts(jobs.answer(forgetful, asked))
    probe = MLXRunner(tiny, CHUNK)
    most = (probe.batch_bytes([440] * 3) + probe.batch_bytes([500] * 3)) // 2
    narrow = MLXRunner(tiny, CHUNK, Memory(most, 2**18))
    begun: list[int] = []
    insert = narrow.insert
    narrow.insert = lambda rows: (begun.extend(each.uid for each in rows), insert(rows))[1]  # type: ignore[method-assign]
    assert facts(jobs.answer(narrow, asked)) == expected
    assert len(begun) > len(set(begun)) == 3, "some began more than once"


class Rows:
    """Rows of one owner in a runner, and what they said."""

    def __init__(self, runner: MLXRunner) -> None:
        self.runner = runner
        self.said: dict[int, list[int]] = defaultdict(list)
        self.reused: dict[int, int] = {}
        self._last = 0

    def insert(self, prompt: tuple[int, ...], most: int, sampling: Sampling = GREEDY, generated: int = 0) -> int:
        self._last += 1
        begun = row(self._last, prompt, most, sampling, "me")
        self.runner.insert([replace(begun, generated=generated)])
        return self._last

    def step(self) -> StepOutput:
        output = step(self.runner)
        self.reused.update(output.prefilled)
        for each in output.tokens:
            self.said[each.uid].append(each.token)
        return output

    def finish(self, uid: int, most: int) -> list[int]:
        while len(self.said[uid]) < most:
            self.step()
        self.runner.remove([uid])
        return self.said[uid]


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple((i * 131) % 40_000 + 100 for i in range(length))


@pytest.mark.parametrize("most", [1, 2, 20])
def test_a_conversation_goes_on_behind_the_answer(runner: MLXRunner, forgetful: MLXRunner, most: int) -> None:
    rows, alone = Rows(runner), Rows(forgetful)
    first = prompt_of(50)
    said = rows.finish(rows.insert(first, most), most)
    second = (*first, *said, 7, 8, 9)
    uid = rows.insert(second, 12)
    assert rows.finish(uid, 12) == alone.finish(alone.insert(second, 12), 12)
    assert rows.reused[uid] == 50 + most - 1  # the last token was chosen and never fed


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_that_left_in_any_stage_is_taken_up_where_it_was(
    tiny: LoadedModel, forgetful: MLXRunner, sampling: Sampling
) -> None:
    prompt, most = prompt_of(5 * CHUNK), 12
    alone = Rows(forgetful)
    expected = alone.finish(alone.insert(prompt, most, sampling), most)
    for steps in range(1, 14):
        runner = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28))
        rows = Rows(runner)
        rows.insert(prompt_of(9)[::-1], 100)
        cut = rows.insert(prompt, most, sampling)
        for _ in range(steps):
            rows.step()
        runner.remove([cut])
        said = rows.said[cut]
        again = rows.insert((*prompt, *said), most - len(said), sampling, generated=len(said))
        assert [*said, *rows.finish(again, most - len(said))] == expected
        if said:  # with the step that was under way when it left, all that it had said had been fed
            assert rows.reused[again] == len(prompt) + len(said) - 1
        elif steps > 4:
            assert rows.reused[again] >= CHUNK


def test_a_prefix_that_was_evicted_in_the_meantime_is_computed_again(runner: MLXRunner) -> None:
    rows = Rows(runner)
    expected = rows.finish(rows.insert(prompt_of(20 * CHUNK), 5), 5)
    again = rows.insert(prompt_of(20 * CHUNK), 5)
    runner._prefixes.clear()
    read = []
    while len(rows.said[again]) < 5:
        read.append(rows.step().prompt_tokens)
    assert rows.said[again] == expected
    assert max(read) < 2 * CHUNK  # though it came as a short one


def test_what_made_a_batch_fail_is_not_kept(runner: MLXRunner) -> None:
    rows = Rows(runner)
    rows.finish(rows.insert(prompt_of(50), 5), 5)
    assert runner.stats()["prefix_cache_bytes"] > 0
    runner.reset()
    assert runner.stats()["prefix_cache_bytes"] == 0


def test_prefixes_give_way_to_rows(tiny: LoadedModel, jobs: Jobs) -> None:
    runner = MLXRunner(tiny, CHUNK, Memory(2**21, 2**21))
    kept: list[float] = []
    for i in range(8):
        jobs.answer(runner, [claimed(f"{i} " + "word " * 400, max_tokens=2)])
        kept.append(runner.stats()["prefix_cache_bytes"])
    seen: list[float] = []
    execute = runner.execute
    runner.execute = lambda plan: (seen.append(runner.stats()["prefix_cache_bytes"]), execute(plan))[1]  # type: ignore[method-assign]
    jobs.answer(runner, [claimed("other " * 2800, max_tokens=50)])
    assert 0 < seen[0] < kept[-1]


@pytest.mark.slow
def test_a_real_conversation_reads_only_what_is_new(smollm2_path: Path) -> None:
    model, jobs = load_model(smollm2_path), Jobs(smollm2_path)
    runner, forgetful = MLXRunner(model, 32, Memory(2**32, 2**30)), MLXRunner(model, 32)
    said: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    known = 0
    for question in ("What is the capital of France?", "And of Spain?", "Which of them is larger?"):
        said.append({"role": "user", "content": question})
        turn = claimed(question, sampling=GREEDY, max_tokens=60, messages=tuple(said))
        (answer,), (undisturbed,) = jobs.answer(runner, [turn]), jobs.answer(forgetful, [turn])
        assert facts([answer]) == facts([undisturbed])
        assert answer.cached_tokens >= known
        said.append({"role": "assistant", "content": answer.text})
        known = answer.prompt_tokens + answer.ending.completion_tokens - 1
    assert "Paris" in said[2]["content"]


def test_of_a_long_shared_prefix_only_what_differs_is_read_in_one_step(runner: MLXRunner) -> None:
    shared = prompt_of(2000)
    read = []
    for i in range(2):
        runner.insert([row(i, (*shared, *range(100 + i, 120 + i)), 1, owner="me")])
        steps: list[StepOutput] = []
        while not steps or not steps[-1].tokens:
            steps.append(step(runner))
        runner.remove([i])
        read.append(sum(each.prompt_tokens for each in steps))
    assert read == [2019, 19]
    assert steps[-1].prefilled == {1: 2000}
    assert len(steps) <= 3
