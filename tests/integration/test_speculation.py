"""Several tokens in a step: the text is what it would have been, whatever is guessed, and dear guesses end."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.jobs.log import EventKind
from shared.jobs.request import Sampling
from tests.plugins.stack import Stack
from tests.support.runner import resumed, step
from tests.support.runner import row as row_of
from tests.support.waiting import eventually
from worker.models.load import LoadedModel, load_model
from worker.runner import forward
from worker.runner.base import Row
from worker.runner.decode_row import DecodeRow
from worker.runner.kv_cache import KVCache
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.pass_cost import LENGTHS, PassCost
from worker.runner.speculation.verification import MAX_ROWS, Speculation

CHUNK = 16
GREEDY = Sampling(temperature=0.0)
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


def row(uid: int, length: int, most: int, sampling: Sampling = GREEDY, owner: str | None = None) -> Row:
    return row_of(uid, [(uid * 977 + i * 131) % 40_000 + 100 for i in range(length)], most, sampling, owner)


Said = dict[int, list[int]]


def run(runner: MLXRunner, rows: Sequence[Row], late: dict[int, list[Row]] | None = None) -> Said:
    """Step until all rows have all their tokens; `late` are those to insert before a step."""
    said: Said = defaultdict(list)
    waiting = dict(late or {})
    due = sum(each.max_new_tokens for each in [*rows, *(one for some in waiting.values() for one in some)])
    runner.insert(rows)
    for steps in range(2000):
        runner.insert(waiting.pop(steps, []))
        for output in step(runner).tokens:
            said[output.uid].append(output.token)
        if sum(map(len, said.values())) >= due and not waiting:
            break
    assert not step(runner).tokens
    return said


def answers(plain: MLXRunner, rows: Sequence[Row]) -> Said:
    """What they say alone, without guesses."""
    return {each.uid: run(plain, [each])[each.uid] for each in rows}


@contextmanager
def drafting(rows: Sequence[Row], expected: Said, wrong: Callable[[int], bool]) -> Iterator[None]:
    """Draft in every step, by any length, what the rows are going to say, but for the tokens at wrong places."""
    whole = {each.uid: [*each.prompt, *expected[each.uid]] for each in rows}
    lengths = cycle(LENGTHS)

    def propose(_: NgramProposer, some: Sequence[DecodeRow], most: int) -> list[list[int]]:
        starts = [row.length + (row.next_input is not None) for row in some]
        texts = [whole[row.row.uid][start:][:most] for row, start in zip(some, starts, strict=True)]
        return [
            [token + wrong(start + i) for i, token in enumerate(text)]
            for text, start in zip(texts, starts, strict=True)
        ]

    def length(_: Speculation, some: Sequence[DecodeRow]) -> int:
        left = min(row.remaining if row.sampled else 0 for row in some)
        return next((each for each in [next(lengths), *LENGTHS[::-1]] if each < left), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NgramProposer, "propose", propose)
        patch.setattr(Speculation, "length", length)
        yield


def fifth(place: int) -> bool:
    return place % 5 == 3


def drafted(runner: MLXRunner) -> tuple[float, float]:
    stats = runner.stats()
    return stats["speculation_drafted_tokens_total"], stats["speculation_accepted_tokens_total"]


@pytest.mark.parametrize("wrong", [lambda _: False, fifth, lambda _: True], ids=["right", "mixed", "wrong"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_drafts_change_no_token(
    plain: MLXRunner, runner: MLXRunner, sampling: Sampling, wrong: Callable[[int], bool]
) -> None:
    one = row(1, 21, 60, sampling)
    expected = answers(plain, [one])
    with drafting([one], expected, wrong):
        assert run(runner, [one]) == expected
    tried, right = drafted(runner)
    assert tried > 50
    places = {wrong(place) for place in range(9)}
    assert (right == tried, right == 0) == (places == {False}, places == {True})


def test_right_drafts_spare_steps(plain: MLXRunner, runner: MLXRunner) -> None:
    one = row(1, 21, 120)
    expected = answers(plain, [one])
    with drafting([one], expected, lambda _: False):
        runner.insert([one])
        outputs = [step(runner) for _ in range(40)]
    assert max(len(output.tokens) for output in outputs) == 17
    assert {output.verified for output in outputs if len(output.tokens) > 1} == {True}
    assert not step(runner).tokens


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 17, 18, 19, 20])
def test_a_row_never_gets_more_than_its_limit(plain: MLXRunner, runner: MLXRunner, most: int) -> None:
    one = row(1, 9, most)
    expected = answers(plain, [one])
    longer = answers(plain, [replace(one, max_new_tokens=60)])
    with drafting([one], longer, fifth):
        assert run(runner, [one]) == expected
    assert runner.stats()["kv_bytes"] == 0


def test_a_few_rows_are_guessed_together_as_they_come_and_go(plain: MLXRunner, runner: MLXRunner) -> None:
    """Of different lengths and samplings; each keeps as many of its tokens as are right for it."""
    rows = [row(uid, 5 + 9 * uid, 20 + 7 * uid, SAMPLINGS[uid % 4]) for uid in range(8)]
    expected = answers(plain, rows)
    late = {3: rows[2:3], 5: rows[3:4], 9: rows[4:5], 12: rows[5:7], 14: rows[7:]}
    with drafting(rows, expected, lambda place: place % 7 in (2, 3)):
        assert run(runner, rows[:2], late) == expected
    tried, right = drafted(runner)
    assert 0 < right < tried


def test_more_rows_than_a_few_are_not_guessed(plain: MLXRunner, runner: MLXRunner) -> None:
    rows = [row(uid, 9, 12) for uid in range(MAX_ROWS + 1)]
    expected = answers(plain, rows)
    with drafting(rows, expected, fifth):
        assert run(runner, rows) == expected
    assert drafted(runner) == (0, 0)


def test_rows_with_penalties_are_not_guessed_nor_what_is_beside_them(plain: MLXRunner, runner: MLXRunner) -> None:
    rows = [row(1, 9, 30, PENALISED), row(2, 9, 20)]
    expected = answers(plain, rows)
    with drafting(rows, expected, fifth):
        assert run(runner, rows) == expected
    assert drafted(runner) == (0, 0)


def test_nothing_is_guessed_while_a_prompt_is_read(plain: MLXRunner, runner: MLXRunner) -> None:
    rows = [row(1, 9, 200), row(2, 40 * CHUNK, 5)]
    expected = answers(plain, rows)
    with drafting(rows, expected, fifth):
        runner.insert(rows[:1])
        said = [each.token for _ in range(5) for each in step(runner).tokens]
        runner.insert(rows[1:])
        while not (output := step(runner)).prefilled:
            said += [each.token for each in output.tokens]
            assert len(output.tokens) <= 1
        said += [each.token for each in output.tokens if each.uid == 1]
        while len(said) < 200:
            said += [each.token for each in step(runner).tokens if each.uid == 1]
    assert said == expected[1]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_a_row_goes_on_where_it_was_cut(plain: MLXRunner, runner: MLXRunner, sampling: Sampling) -> None:
    one = row(0, 9, 40, sampling)
    said = answers(plain, [one])[0]
    for each in (resumed(one, cut, said[:cut]) for cut in range(1, 30)):
        rest = {each.uid: said[each.uid :]}
        with drafting([each], rest, fifth):
            assert run(runner, [each]) == rest


@pytest.mark.parametrize("steps", range(1, 9))
def test_what_is_left_when_a_row_is_removed_is_what_it_had(
    plain: MLXRunner, runner: MLXRunner, tiny: LoadedModel, steps: int
) -> None:
    """The prefix that the next row takes over has the keys and values of exactly its tokens."""
    one = row(1, 30, 150, owner="me")
    expected = answers(plain, [one])
    with drafting([one], expected, fifth):
        runner.insert([one])
        said = [each.token for _ in range(steps) for each in step(runner).tokens]
        runner.remove([1])
    assert said == expected[1][: len(said)]
    assert runner.stats()["kv_bytes"] == 0
    text = (*one.prompt, *expected[1])
    length, layers = runner._prefixes.load("me", text)
    assert length in {len(one.prompt) - 1, len(one.prompt) + len(said) - 1, len(one.prompt) + len(said)}
    fresh = KVCache.empty(tiny.model)
    forward.fill(tiny.model, fresh, [text[:length]])
    for found, (keys, values) in zip(layers, fresh.copy_columns(0, 0, length), strict=True):
        assert mx.allclose(found.keys[:, :, :length], keys, rtol=1e-3, atol=1e-5)
        assert mx.allclose(found.values[:, :, :length], values, rtol=1e-3, atol=1e-5)
    again = replace(one, uid=2, prompt=(*text[:length], 7, 8), max_new_tokens=9)
    assert run(runner, [again])[2] == run(plain, [replace(again, owner=None)])[2]


def test_a_prompt_that_repeats_is_found_without_being_told(tiny: LoadedModel) -> None:
    """The model of this test says what follows its last token in the prompt: it repeats it for ever."""
    repeating = Repeating(tiny)
    runner = repeating.runner()
    runner._speculation.cost = costing(0.1)
    said = run(runner, [row_of(1, (*range(100, 160), 100), 300)])[1]
    assert said == [101 + (i % 60) for i in range(59)] + [100 + (i % 60) for i in range(241)]
    tried, right = drafted(runner)
    assert right > 200
    assert repeating.passes < 80
    assert tried - right < 30


class Repeating:
    """The tiny model, made to say something: it counts its passes, and the tokens in them."""

    def __init__(self, tiny: LoadedModel, says: Callable[[int], int] | None = None) -> None:
        self.passes = self.tokens = 0
        self._tiny = tiny
        self._says = says or (lambda token: 100 + (token - 99) % 60)

    def runner(self) -> MLXRunner:
        return MLXRunner(replace(self._tiny, model=self), CHUNK, speculation_tokens=16)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        logits = self._tiny.model(tokens, cache=cache)
        self.passes += 1
        self.tokens += tokens.shape[1]
        said = [[self._says(token) for token in each] for each in cast("list[list[int]]", tokens.tolist())]
        return mx.put_along_axis(mx.zeros_like(logits), mx.array(said)[:, :, None], mx.array(1.0), axis=-1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tiny.model, name)


def costing(wide: float) -> PassCost:
    """A pass costs 1, and so much more for each further token."""
    return PassCost({1: 1.0, 17: 1.0 + 16 * wide})


def test_drafts_that_cost_what_they_spare_are_not_verified(tiny: LoadedModel) -> None:
    """Each token more costs as much as a pass."""
    runner = Repeating(tiny).runner()
    runner._speculation.cost = costing(1.0)
    run(runner, [row_of(1, (*range(100, 160), 100), 300)])
    assert drafted(runner) == (0, 0)


def test_drafts_that_are_wrong_end(tiny: LoadedModel) -> None:
    """Pairs of tokens come again and again, and what follows them is never the same."""
    said = iter(token for i in range(5000) for token in (50, 51, 1000 + i))
    following: dict[int, int] = {}

    def says(token: int) -> int:
        return following.setdefault(token, next(said)) if token >= 1000 else {50: 51}.get(token, 1000 + len(following))

    repeating = Repeating(tiny, says=says)
    runner = repeating.runner()
    runner._speculation.cost = costing(0.2)
    run(runner, [row_of(1, tuple(range(100, 160)), 1200)])
    cost = repeating.passes + 0.2 * (repeating.tokens - repeating.passes - 60)
    assert cost < 12 + 1200 * 1.02


def test_what_passes_cost_is_measured_while_the_model_warms(runner: MLXRunner) -> None:
    runner.warm()
    cost = runner._speculation.cost
    assert set(cost.seconds) == {1, *(1 + length for length in LENGTHS)}
    assert min(cost.seconds.values()) > 0
    assert drafted(runner) == (0, 0)
    assert runner.stats()["kv_bytes"] == 0


def test_rows_that_ask_for_log_probabilities_are_not_drafted(plain: MLXRunner, runner: MLXRunner) -> None:
    one = row(1, 9, 30)
    expected = answers(plain, [one])
    with drafting([one], expected, lambda _: False):
        assert run(runner, [replace(one, request=replace(one.request, logprobs=2))]) == expected
    assert drafted(runner) == (0, 0)


def test_zero_tokens_mean_none(tiny: LoadedModel) -> None:
    runner = MLXRunner(tiny, CHUNK)
    runner.warm()
    run(runner, [row_of(1, (*range(100, 160), 100), 50)])
    assert drafted(runner) == (0, 0)


TEXT = (
    "On Monday morning Anna walked down to the harbour, bought two loaves of bread, a jar of honey and a newspaper, "
    "and sat on the old stone wall to wait for the ferry. The sea was quiet, the gulls were loud, and the ferry was "
    "late, as it had been every Monday since the spring."
)


def stat(stack: Stack, name: str) -> float:
    return sum(worker.stats.get(name, 0) for worker in stack.ready_workers())


@pytest.mark.long
def test_killed_workers_texts_go_on_as_if_nothing_had_been_guessed(smollm2_api: Stack) -> None:
    stack = smollm2_api
    question = {"role": "user", "content": f"Repeat this text word for word: {TEXT}"}
    bodies = [{"messages": [question], "temperature": drawn, "seed": 3, "max_tokens": 70} for drawn in (0, 0.3)]
    with stack.client() as client:
        first = stack.start_worker(SPECULATION_TOKENS="0")
        undisturbed = [client.submit(body).id for body in bodies]
        eventually(lambda: all(client.job(job).status.terminal for job in undisturbed), "they end", 60)
        expected = [client.job(job) for job in undisturbed]
        assert stat(stack, "speculation_drafted_tokens_total") == 0
        stack.stop(first)
        second = stack.start_worker()
        jobs = [client.submit(body).id for body in bodies]
        for event in client.events(jobs[1]):
            if event.n > 4 and event.text and second.poll() is None:
                assert stack.stop(second, signal.SIGKILL) == -signal.SIGKILL
                stack.start_worker()
        eventually(lambda: all(client.job(job).status.terminal for job in jobs), "they end", 60)
        eventually(lambda: stat(stack, "speculation_accepted_tokens_total") > 10, "tokens were guessed", 10)
        for job, said in zip(map(client.job, jobs), expected, strict=True):
            events = list(client.events(job.id))
            assert EventKind.RESUMED in {event.kind for event in events}
            assert job.text == "".join(event.text for event in events) == said.text
            assert job.usage["completion_tokens"] == said.usage["completion_tokens"]
