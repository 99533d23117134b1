"""Jobs that begin with what earlier ones left in the cache say what they would have said without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.record import Ending, Job
from shared.jobs.request import Request, Sampling
from tests.plugins.work import claimed, sequence_for
from worker.engine.core import Batch
from worker.engine.sequence import Said
from worker.models.load import LoadedModel, load_model
from worker.runner.base import Row
from worker.runner.memory import Memory
from worker.runner.model_runner import TextBackend

CHUNK = 16
GREEDY = Sampling(0.0)
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
def backend(tiny: LoadedModel) -> TextBackend:
    return TextBackend(tiny, CHUNK, Memory(2**30, 2**28))


@pytest.fixture(scope="module")
def forgetful(tiny: LoadedModel) -> TextBackend:
    return TextBackend(tiny, CHUNK)


def answer(backend: TextBackend, jobs: Iterable[Job], slots: int = 8) -> list[Ending]:
    """How an engine ends these jobs, which come at once."""
    said: list[Said] = []
    engine = Batch(lambda: backend, slots, said.extend)
    engine.load()
    sequences = [sequence_for(job, backend) for job in jobs]
    for sequence in sequences:
        engine.submit(sequence)
    engine.step()
    while engine.busy:
        engine.step()
    return [sequence.ending for sequence in sequences if sequence.ending is not None]


def ask(question: str, sampling: Sampling, owner: str = "me") -> Job:
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": question})
    asked = Request("tiny", 24, sampling, messages=messages)
    return replace(claimed(question), owner=owner, generation=asked)


def with_stop(job: Job, stop: str) -> Job:
    return replace(job, generation=replace(job.generation, stop=(stop,)))


def facts(endings: Iterable[Ending]) -> list[tuple[object, ...]]:
    return [(each.text, each.finish_reason, each.prompt_tokens, each.completion_tokens) for each in endings]


def test_answers_are_the_same_with_and_without_alone_and_together(backend: TextBackend, forgetful: TextBackend) -> None:
    plain = [ask(question, sampling) for question in QUESTIONS for sampling in SAMPLINGS]
    texts = [answer(forgetful, [job])[0].text for job in plain]
    jobs = [*plain, *(with_stop(job, text[9:12]) for job, text in zip(plain, texts, strict=True))]
    expected = facts(answer(forgetful, [job])[0] for job in jobs)
    assert {fact[1] for fact in expected} == {"length", "stop"}
    alone = [answer(backend, [job])[0] for job in jobs]
    together = answer(backend, jobs)
    in_pairs = answer(backend, reversed(jobs), slots=2)
    assert facts(alone) == facts(together) == facts(reversed(in_pairs)) == expected
    assert alone[0].cached_tokens == 0
    assert all(80 < each.cached_tokens < each.prompt_tokens for each in (*alone[1:], *together, *in_pairs))
    assert all(each.cached_tokens == each.prompt_tokens - 1 for each in together)


def test_those_that_come_at_once_profit_from_the_first_of_them(backend: TextBackend, forgetful: TextBackend) -> None:
    jobs = [ask(f"{i} {QUESTIONS[i % 3]}", GREEDY) for i in range(12)]
    endings = answer(backend, jobs, slots=12)
    assert facts(endings) == facts(answer(forgetful, jobs, slots=12))
    assert [each.cached_tokens > 0 for each in endings] == [False] + [True] * 11


def test_keys_profit_from_themselves_only(backend: TextBackend) -> None:
    mine, yours = ask("Hi", GREEDY), ask("Hi", GREEDY, owner="you")
    first, second, third = (answer(backend, [job])[0] for job in (mine, yours, yours))
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    assert third.cached_tokens > 0


def test_a_shared_system_message_serves_other_keys_and_only_that(backend: TextBackend, forgetful: TextBackend) -> None:
    mine, yours = ask("Why is the sky blue?", GREEDY), ask("Why is the sky blue?", GREEDY, owner="you")
    shared = replace(mine, generation=replace(mine.generation, share_system_prompt=True))
    prompt = backend.encode(shared.generation, {})
    assert 80 < (given := prompt.shared) < len(prompt.tokens) - 5
    assert backend.encode(mine.generation, {}).shared == 0
    answer(backend, [mine])
    assert answer(backend, [yours])[0].cached_tokens == 0
    backend.reset()
    answer(backend, [shared])
    (ending,) = answer(backend, [yours])
    assert ending.cached_tokens == given
    assert facts([ending]) == facts(answer(forgetful, [yours]))


class Rows:
    """Rows of one owner in a backend, and what they said."""

    def __init__(self, backend: TextBackend) -> None:
        self.backend = backend
        self.said: dict[int, list[int]] = defaultdict(list)
        self.reused: dict[int, int] = {}
        self._last = 0

    def insert(self, prompt: tuple[int, ...], room: int, sampling: Sampling = GREEDY, generated: int = 0) -> int:
        self._last += 1
        self.backend.insert([Row(self._last, prompt, generated, room, sampling, "me")])
        return self._last

    def step(self) -> None:
        result = self.backend.step()
        self.reused.update(result.prefilled)
        for uid, token in result.tokens:
            self.said[uid].append(token)

    def finish(self, uid: int, room: int) -> list[int]:
        while len(self.said[uid]) < room:
            self.step()
        self.backend.remove([uid])
        return self.said[uid]


def prompt_of(length: int) -> tuple[int, ...]:
    return tuple((i * 131) % 40_000 + 100 for i in range(length))


@pytest.mark.parametrize("room", [1, 2, 20])
def test_a_conversation_goes_on_behind_the_answer(backend: TextBackend, forgetful: TextBackend, room: int) -> None:
    rows, alone = Rows(backend), Rows(forgetful)
    first = prompt_of(50)
    said = rows.finish(rows.insert(first, room), room)
    second = (*first, *said, 7, 8, 9)
    uid = rows.insert(second, 12)
    assert rows.finish(uid, 12) == alone.finish(alone.insert(second, 12), 12)
    assert rows.reused[uid] == 50 + room - 1  # the last token was chosen and never fed


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_row_that_left_in_any_stage_is_taken_up_where_it_was(
    tiny: LoadedModel, forgetful: TextBackend, sampling: Sampling
) -> None:
    prompt, room = prompt_of(5 * CHUNK), 12
    alone = Rows(forgetful)
    expected = alone.finish(alone.insert(prompt, room, sampling), room)
    for steps in range(1, 14):
        # A clock that stands still: chunks are whole, however busy the machine is.
        backend = TextBackend(tiny, CHUNK, Memory(2**30, 2**28), clock=lambda: 0.0)
        rows = Rows(backend)
        rows.insert(prompt_of(9)[::-1], 100)
        cut = rows.insert(prompt, room, sampling)
        for _ in range(steps):
            rows.step()
        backend.remove([cut])
        said = rows.said[cut]
        again = rows.insert((*prompt, *said), room - len(said), sampling, generated=len(said))
        assert [*said, *rows.finish(again, room - len(said))] == expected
        if said:  # with the step that was under way when it left, all that it had said had been fed
            assert rows.reused[again] == len(prompt) + len(said) - 1
        elif steps > 3:
            assert rows.reused[again] >= CHUNK


def test_a_prefix_that_was_forgotten_in_the_meantime_is_read_again(backend: TextBackend) -> None:
    rows = Rows(backend)
    expected = rows.finish(rows.insert(prompt_of(20 * CHUNK), 5), 5)
    again = rows.insert(prompt_of(20 * CHUNK), 5)
    backend._prefixes.clear()
    read = []
    while len(rows.said[again]) < 5:
        result = backend.step()
        read.append(result.prompt_tokens)
        rows.said[again] += [token for _, token in result.tokens]
    assert rows.said[again] == expected
    assert max(read) == CHUNK  # though it came as a short one


def test_what_made_a_batch_fail_is_not_kept(backend: TextBackend) -> None:
    rows = Rows(backend)
    rows.finish(rows.insert(prompt_of(50), 5), 5)
    assert backend.stats()["prefix_cache_bytes"] > 0
    backend.reset()
    assert backend.stats()["prefix_cache_bytes"] == 0


def test_prefixes_give_way_to_rows_and_rows_wait_for_rows(tiny: LoadedModel) -> None:
    backend = TextBackend(tiny, CHUNK, Memory(2**21, 2**21))
    rows = Rows(backend)
    for i in range(8):
        rows.finish(rows.insert((i, *prompt_of(400)), 2), 2)
    kept = backend.stats()["prefix_cache_bytes"]
    uid = rows.insert(prompt_of(3000)[::-1], 50)
    assert 0 < backend.stats()["prefix_cache_bytes"] < kept
    backend.remove([uid])


@pytest.mark.slow
def test_a_real_conversation_reads_only_what_is_new(smollm2_path: Path) -> None:
    model = load_model(smollm2_path)
    backend, forgetful = TextBackend(model, 32, Memory(2**32, 2**30)), TextBackend(model, 32)
    said: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    known = 0
    for question in ("What is the capital of France?", "And of Spain?", "Which of them is larger?"):
        said.append({"role": "user", "content": question})
        asked = Request("smollm2", 60, GREEDY, messages=tuple(said))
        turn = replace(claimed(question), generation=asked)
        (ending,), (undisturbed,) = answer(backend, [turn]), answer(forgetful, [turn])
        assert facts([ending]) == facts([undisturbed])
        assert ending.cached_tokens >= known
        said.append({"role": "assistant", "content": ending.text})
        known = ending.prompt_tokens + ending.completion_tokens - 1
    assert "Paris" in said[2]["content"]


def test_of_a_long_shared_prefix_only_what_differs_is_read_in_one_step(backend: TextBackend) -> None:
    shared = prompt_of(2000)
    read = []
    for i in range(2):
        backend.insert([Row(i, (*shared, *range(100 + i, 120 + i)), 0, 1, GREEDY, "me")])
        steps = []
        while not steps or not steps[-1].tokens:
            steps.append(backend.step())
        backend.remove([i])
        read.append(sum(step.prompt_tokens for step in steps))
    assert read == [2019, 19]
    assert steps[-1].prefilled == {1: 2000}
    assert len(steps) <= 3
