"""Logits processors and log-probabilities in a real batch: exact, isolated, and only for rows that ask for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.jobs.request import Request, Sampling
from tests.support.runner import GREEDY, alone, numbered, run, step
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


def row(
    uid: int, length: int, max_new_tokens: int = 8, sampling: Sampling = GREEDY, alternatives: int | None = None
) -> Row:
    return numbered(uid, length, max_new_tokens, sampling, logprobs=alternatives)


def outputs(runner: MLXRunner, rows: Sequence[Row], late: Sequence[Row] = ()) -> dict[int, list[TokenOutput]]:
    """Step until all rows have generated all their tokens. The `late` rows join after three steps."""
    results: dict[int, list[TokenOutput]] = defaultdict(list)
    runner.insert(rows)
    for steps in range(500):
        if steps == 3:
            runner.insert(late)
        for each in step(runner).tokens:
            results[each.uid].append(each)
        if all(len(results[each.uid]) == each.max_new_tokens for each in [*rows, *late]):
            return results
    pytest.fail("the rows do not end")


def reference(tiny: LoadedModel, one: Row, tokens: Sequence[int]) -> mx.array:
    """Compute the model's log-probabilities [tokens, vocabulary] in one pass over the whole text."""
    text = mx.array([[*one.prompt, *tokens[:-1]]])
    logits = tiny.model(text)[0, len(one.prompt) - 1 :]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("alternatives", [0, 1, 20])
def test_log_probabilities_are_those_of_the_model(
    tiny: LoadedModel, runner: MLXRunner, sampling: Sampling, alternatives: int
) -> None:
    """Before penalties, temperature and filters; the other rows ask for none or for another number of alternatives."""
    one = row(1, 21, sampling=sampling, alternatives=alternatives)
    others = [row(2, 5), row(3, 40, alternatives=3), row(4, 9, sampling=SAMPLINGS[1])]
    results = outputs(runner, [others[0], one, others[1]], others[2:])
    tokens = [each.token for each in results[1]]
    assert tokens == alone(runner, replace(one, uid=9, request=replace(one.request, logprobs=None)))
    expected = reference(tiny, one, tokens)
    for each, line in zip(results[1], expected, strict=True):
        assert each.logprob == pytest.approx(line[each.token].item(), abs=1e-4)
        assert len(each.top_logprobs) == alternatives
        best = sorted(enumerate(line.tolist()), key=lambda pair: -pair[1])[:alternatives]
        assert [value for _, value in each.top_logprobs] == pytest.approx([value for _, value in best], abs=1e-4)
        for token, value in each.top_logprobs:
            assert value == pytest.approx(line[token].item(), abs=1e-4)
    assert {each.logprob for each in (*results[2], *results[4])} == {None}
    assert {each.top_logprobs for each in (*results[2], *results[4])} == {()}
    assert {len(each.top_logprobs) for each in results[3]} == {3}


def test_every_token_has_log_probabilities_while_rows_join_and_leave(runner: MLXRunner) -> None:
    rows = [row(uid, 3 + 40 * (uid % 3), 4 + uid, alternatives=uid % 3) for uid in range(9)]
    for uid, tokens in outputs(runner, rows[:4], rows[4:]).items():
        assert all(each.logprob is not None for each in tokens)
        assert {len(each.top_logprobs) for each in tokens} == {uid % 3}


def test_no_log_probabilities_are_computed_unless_a_row_asks(
    runner: MLXRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs.BatchLogprobs, "queue", lambda *_: pytest.fail("no row asks for log-probabilities"))
    assert len(alone(runner, row(1, 9))) == 8


class OnlyToken:
    """A processor that allows only token n for a row with seed 1000 + n, and raises for a row with seed 666.

    Args:
        fails_at: number of generated tokens after which it raises.
        in_prepare: raise in `prepare` instead.
    """

    def __init__(self, fails_at: int = 3, in_prepare: bool = False) -> None:
        self.calls: list[int] = []
        self._fails_at = fails_at
        self._in_prepare = in_prepare

    def applies_to(self, request: Request) -> bool:
        return request.sampling.seed >= 1000 or request.sampling.seed == 666

    def prepare(self, rows: Sequence[Row]) -> BatchProcessor:
        bad = any(each.sampling.seed == 666 for each in rows)
        if bad and self._in_prepare:
            raise ValueError("this row fails")
        allowed = mx.array([[each.sampling.seed - 1000] for each in rows])

        def apply(logits: mx.array, last: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
            self.calls.append(len(rows))
            starts = [len(each.prompt) for each in rows]
            if bad and any(
                each.sampling.seed == 666 and len(before) + 1 - start >= self._fails_at
                for each, before, start in zip(rows, history, starts, strict=True)
            ):
                raise ValueError("this row fails")
            ids = mx.arange(logits.shape[-1])[None]
            return mx.where((ids == allowed) | (allowed < 0), logits, -mx.inf)

        return apply


def test_a_processor_handles_all_its_rows_in_one_call(tiny: LoadedModel) -> None:
    processor = OnlyToken()
    runner = MLXRunner(tiny, CHUNK, processors=[processor])
    rows = [row(uid, 5 + uid, sampling=Sampling(0.9, seed=1000 + uid)) for uid in range(3)]
    plain = [row(7, 9), row(8, 9, sampling=SAMPLINGS[3])]
    expected = {each.uid: alone(MLXRunner(tiny, CHUNK), each) for each in plain}
    tokens = run(runner, [rows[0], plain[0], *rows[1:], plain[1]])
    assert {uid: tokens[uid] for uid in (7, 8)} == expected
    assert all(tokens[uid] == [uid] * 8 for uid in range(3))
    assert set(processor.calls) == {3}
    processor.calls.clear()
    alone(runner, plain[0])
    assert not processor.calls


@pytest.mark.parametrize(("fails_at", "in_prepare"), [(0, False), (3, False), (0, True)])
def test_a_processor_that_raises_fails_only_its_row(tiny: LoadedModel, fails_at: int, in_prepare: bool) -> None:
    runner = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28), processors=[OnlyToken(fails_at, in_prepare)])
    others = [row(1, 5, sampling=Sampling(0.0, seed=1042)), row(2, 7), row(3, 9, sampling=SAMPLINGS[3])]
    expected = {each.uid: alone(runner, each) for each in others}
    bad = replace(row(4, 8, sampling=Sampling(0.0, seed=666)), owner="me")
    runner.insert([*others[:1], bad, *others[1:]])
    tokens: dict[int, list[int]] = defaultdict(list)
    failed: list[tuple[int, Exception]] = []
    for _ in range(20):
        output = step(runner)
        failed += output.failed
        assert 4 not in {each.uid for each in output.tokens} & {uid for uid, _ in output.failed}
        for each in output.tokens:
            tokens[each.uid].append(each.token)
    assert [(uid, str(error)) for uid, error in failed] == [(4, "this row fails")]
    assert {uid: tokens[uid] for uid in expected} == expected
    assert len(tokens[4]) < 8
    assert runner.stats()["kv_bytes"] == 0
