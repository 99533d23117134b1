"""Logits processors and log-probabilities on a real batch: exact, isolated, and only for the rows that ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.jobs.request import Request, Sampling
from tests.support.runner import GREEDY, alone, run, step
from tests.support.runner import row as row_of
from worker.models.load import LoadedModel, load_model
from worker.runner.base import Row, TokenOutput
from worker.runner.logits import logprobs
from worker.runner.logits.processor import BatchProcessor
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

CHUNK = 16
SAMPLINGS = (
    GREEDY,
    Sampling(1.0, seed=11),
    Sampling(0.8, top_p=0.5, seed=3),
    Sampling(0.0, repetition_penalty=1.4, presence_penalty=0.3),
)


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, CHUNK, Memory(2**30, 2**28))


def row(uid: int, length: int, most: int = 8, sampling: Sampling = GREEDY, asked: int | None = None) -> Row:
    prompt = [(uid * 977 + i * 131) % 40_000 + 100 for i in range(length)]
    return row_of(uid, prompt, most, sampling, logprobs=asked)


def outputs(runner: MLXRunner, rows: Sequence[Row], late: Sequence[Row] = ()) -> dict[int, list[TokenOutput]]:
    """Step until all rows have all their tokens; `late` ones join after three steps."""
    said: dict[int, list[TokenOutput]] = defaultdict(list)
    runner.insert(rows)
    for steps in range(500):
        if steps == 3:
            runner.insert(late)
        for each in step(runner).tokens:
            said[each.uid].append(each)
        if all(len(said[each.uid]) == each.max_new_tokens for each in [*rows, *late]):
            return said
    pytest.fail("it never ends")


def by_hand(tiny: LoadedModel, one: Row, said: Sequence[int]) -> mx.array:
    """[tokens, vocabulary] log-probabilities of the model's own distribution, in one pass over the whole text."""
    text = mx.array([[*one.prompt, *said[:-1]]])
    logits = tiny.model(text)[0, len(one.prompt) - 1 :]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("asked", [0, 1, 20])
def test_log_probabilities_are_those_of_the_model(
    tiny: LoadedModel, runner: MLXRunner, sampling: Sampling, asked: int
) -> None:
    """Before penalties, temperature and filters; in company that asks for none, or for others."""
    one = row(1, 21, sampling=sampling, asked=asked)
    others = [row(2, 5), row(3, 40, asked=3), row(4, 9, sampling=SAMPLINGS[1])]
    said = outputs(runner, [others[0], one, others[1]], others[2:])
    tokens = [each.token for each in said[1]]
    assert tokens == alone(runner, replace(one, uid=9, request=replace(one.request, logprobs=None)))
    expected = by_hand(tiny, one, tokens)
    for each, line in zip(said[1], expected, strict=True):
        assert each.logprob == pytest.approx(line[each.token].item(), abs=1e-4)
        assert len(each.top_logprobs) == asked
        best = sorted(enumerate(line.tolist()), key=lambda pair: -pair[1])[:asked]
        assert [value for _, value in each.top_logprobs] == pytest.approx([value for _, value in best], abs=1e-4)
        for token, value in each.top_logprobs:
            assert value == pytest.approx(line[token].item(), abs=1e-4)
    assert {each.logprob for each in (*said[2], *said[4])} == {None}
    assert {each.top_logprobs for each in (*said[2], *said[4])} == {()}
    assert {len(each.top_logprobs) for each in said[3]} == {3}


def test_log_probabilities_survive_rows_that_come_and_go(runner: MLXRunner) -> None:
    """Every token of every row that asks has one, however the batch changes around it."""
    rows = [row(uid, 3 + 40 * (uid % 3), 4 + uid, asked=uid % 3) for uid in range(9)]
    for uid, said in outputs(runner, rows[:4], rows[4:]).items():
        assert all(each.logprob is not None for each in said)
        assert {len(each.top_logprobs) for each in said} == {uid % 3}


def test_nothing_is_computed_for_rows_that_do_not_ask(runner: MLXRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs.BatchLogprobs, "queue", lambda *_: pytest.fail("nobody asked"))
    assert len(alone(runner, row(1, 9))) == 8


class Only:
    """Rows with `seed` 1000 + n may say only the token n. A row with seed 666 raises at its nth call."""

    def __init__(self, fails_at: int = 3, in_prepare: bool = False) -> None:
        self.calls: list[int] = []
        self._fails_at = fails_at
        self._in_prepare = in_prepare

    def applies_to(self, request: Request) -> bool:
        return request.sampling.seed >= 1000 or request.sampling.seed == 666

    def prepare(self, rows: Sequence[Row]) -> BatchProcessor:
        bad = any(each.sampling.seed == 666 for each in rows)
        if bad and self._in_prepare:
            raise ValueError("of this row")
        allowed = mx.array([[each.sampling.seed - 1000] for each in rows])

        def apply(logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
            self.calls.append(len(rows))
            starts = [len(each.prompt) for each in rows]
            if bad and any(
                each.sampling.seed == 666 and len(before) + 1 - start >= self._fails_at
                for each, before, start in zip(rows, history, starts, strict=True)
            ):
                raise ValueError("of this row")
            ids = mx.arange(logits.shape[-1])[None]
            return mx.where((ids == allowed) | (allowed < 0), logits, -mx.inf)

        return apply


def test_a_processor_changes_the_rows_that_want_it_all_in_one_call(tiny: LoadedModel) -> None:
    only = Only()
    runner = MLXRunner(tiny, CHUNK, processors=[only])
    rows = [row(uid, 5 + uid, sampling=Sampling(0.9, seed=1000 + uid)) for uid in range(3)]
    plain = [row(7, 9), row(8, 9, sampling=SAMPLINGS[3])]
    expected = {each.uid: alone(MLXRunner(tiny, CHUNK), each) for each in plain}
    said = run(runner, [rows[0], plain[0], *rows[1:], plain[1]])
    assert {uid: said[uid] for uid in (7, 8)} == expected
    assert all(said[uid] == [uid] * 8 for uid in range(3))
    assert set(only.calls) == {3}
    only.calls.clear()
    alone(runner, plain[0])
    assert not only.calls


@pytest.mark.parametrize(("fails_at", "in_prepare"), [(0, False), (3, False), (0, True)])
def test_a_processor_that_raises_fails_only_its_row(tiny: LoadedModel, fails_at: int, in_prepare: bool) -> None:
    runner = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28), processors=[Only(fails_at, in_prepare)])
    others = [row(1, 5, sampling=Sampling(0.0, seed=1042)), row(2, 7), row(3, 9, sampling=SAMPLINGS[3])]
    expected = {each.uid: alone(runner, each) for each in others}
    bad = replace(row(4, 8, sampling=Sampling(0.0, seed=666)), owner="me")
    runner.insert([*others[:1], bad, *others[1:]])
    said: dict[int, list[int]] = defaultdict(list)
    failed: list[tuple[int, Exception]] = []
    for _ in range(20):
        output = step(runner)
        failed += output.failed
        assert 4 not in {each.uid for each in output.tokens} & {uid for uid, _ in output.failed}
        for each in output.tokens:
            said[each.uid].append(each.token)
    assert [(uid, str(error)) for uid, error in failed] == [(4, "of this row")]
    assert {uid: said[uid] for uid in expected} == expected
    assert len(said[4]) < 8
    assert runner.stats()["kv_bytes"] == 0
