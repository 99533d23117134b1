"""A row whose logits are not numbers fails alone; its neighbours generate the same text as without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx

from shared.errors import JobFailure
from shared.jobs.record import Status
from shared.jobs.request import Request, Sampling
from tests.plugins.work import claimed
from tests.support import engine
from tests.support.runner import GREEDY, numbered, run, step
from worker.models.load import LoadedModel, load_model
from worker.runner.base import InvalidLogits, Row
from worker.runner.decode_row import DecodeRow
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.sampler import INVALID, BatchSampler
from worker.runner.speculation.ngram import NgramProposer
from worker.runner.speculation.verification import Speculation

CHUNK = 16
BAD_SEED = 666
SAMPLED = Sampling(1.0, top_p=0.95, seed=BAD_SEED)
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
Fill = Callable[[mx.array], mx.array]


class Poisoned:
    """A model whose logits after the token `poison` are `value`."""

    def __init__(self, model: Any) -> None:
        self.model_of_folder = model
        self.poison: int | None = None
        self.value = float("nan")

    def __call__(self, inputs: mx.array, **options: Any) -> mx.array:
        logits: mx.array = self.model_of_folder(inputs, **options)
        if self.poison is None:
            return logits
        return mx.where((inputs == self.poison)[..., None], mx.array(self.value, logits.dtype), logits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model_of_folder, name)


@dataclass(frozen=True)
class Breaks:
    """A logits processor that fills the logits of requests with `BAD_SEED` from the fourth generated token on."""

    fill: Fill
    prompt_length: int

    def applies_to(self, request: Request) -> bool:
        return request.sampling.seed == BAD_SEED

    def prepare(self, rows: Sequence[Row]) -> Callable[..., mx.array]:
        def process(logits: mx.array, _: mx.array, history: Sequence[Sequence[int]]) -> mx.array:
            bad = mx.array([len(tokens) >= self.prompt_length + 3 for tokens in history])
            return mx.where(bad[:, None], self.fill(logits), logits)

        return process


FILLS: dict[str, Fill] = {
    "all nan": lambda logits: mx.full(logits.shape, float("nan")),
    "nothing allowed": lambda logits: mx.full(logits.shape, -mx.inf),
}


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


def runner_of(model: LoadedModel, speculation_tokens: int = 0, processors: Sequence[Any] = ()) -> MLXRunner:
    memory = Memory(2**30, 2**28)
    return MLXRunner(model, CHUNK, memory, speculation_tokens=speculation_tokens, processors=processors)


def outcome(runner: MLXRunner, rows: Sequence[Row]) -> tuple[dict[int, list[int]], dict[int, Exception]]:
    """Step until every row has ended. Returns the tokens and the errors by uid."""
    tokens: dict[int, list[int]] = defaultdict(list)
    failed: dict[int, Exception] = {}
    runner.insert(rows)
    for _ in range(300):
        output = step(runner)
        failed |= dict(output.failed)
        for each in output.tokens:
            assert each.token != INVALID
            tokens[each.uid].append(each.token)
        if all(each.uid in failed or len(tokens[each.uid]) == each.max_new_tokens for each in rows):
            return {uid: some for uid, some in tokens.items() if some}, failed
    pytest.fail("the rows do not end")


def neighbours(alternatives: int | None) -> list[Row]:
    samplings = (GREEDY, Sampling(0.9, top_k=50, seed=5))
    return [numbered(10 + i, 7 + 9 * i, 14, each, logprobs=alternatives) for i, each in enumerate(samplings)]


def with_poison(tiny: LoadedModel, bad: Row, others: Sequence[Row]) -> tuple[Poisoned, dict[int, list[int]], int]:
    """Return a model that breaks in the middle of a row and nowhere else, all rows' tokens without it, and where."""
    expected = {each.uid: run(runner_of(tiny), [each])[each.uid] for each in (bad, *others)}
    elsewhere = {token for each in others for token in (*each.prompt, *expected[each.uid])} | set(bad.prompt)
    own = expected[bad.uid]
    at = next(i for i, token in enumerate(own) if i >= 2 and token not in elsewhere and token not in own[:i])
    model = Poisoned(tiny.model)
    model.poison = own[at]
    return model, expected, at


@pytest.mark.parametrize("alternatives", [None, 0, 3])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", VALUES)
def test_one_row_with_invalid_logits_fails_alone(
    tiny: LoadedModel, value: str, sampling: Sampling, alternatives: int | None
) -> None:
    bad, others = numbered(1, 21, 14, sampling, owner="me", logprobs=alternatives), neighbours(alternatives)
    model, expected, at = with_poison(tiny, bad, others)
    model.value = VALUES[value]
    runner = runner_of(replace(tiny, model=model))
    tokens, failed = outcome(runner, [others[0], bad, others[1]])
    assert list(failed) == [bad.uid] and isinstance(failed[bad.uid], InvalidLogits)
    written = tokens.pop(bad.uid)
    assert written == expected.pop(bad.uid)[: at + 1]
    assert tokens == expected
    # What the model computed for the failed row is not reused.
    runner.insert([replace(bad, uid=2, prompt=(*bad.prompt, *written, 99))])
    reused = [count for _ in range(5) for count in step(runner).prefilled.values()]
    assert len(reused) == 1 and reused[0] <= len(bad.prompt)


@pytest.mark.parametrize("alternatives", [None, 2])
@pytest.mark.parametrize("speculation_tokens", [0, 16])
def test_all_rows_with_invalid_logits_fail_and_the_runner_continues(
    tiny: LoadedModel, speculation_tokens: int, alternatives: int | None
) -> None:
    rows = [numbered(uid, 5 + uid, 8, logprobs=alternatives) for uid in (1, 2, 3)]
    model = Poisoned(tiny.model)
    runner = runner_of(replace(tiny, model=model), speculation_tokens)
    for each in rows:
        model.poison = each.prompt[-1]
        tokens, failed = outcome(runner, [replace(each, uid=each.uid + i) for i in (10, 20)])
        assert not tokens and set(failed) == {each.uid + 10, each.uid + 20}
    model.poison = None
    tokens, failed = outcome(runner, rows)
    assert not failed and tokens == {each.uid: run(runner_of(tiny), [each])[each.uid] for each in rows}


@pytest.mark.parametrize("rows_in_batch", [1, 3])
def test_speculation_finds_invalid_logits(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, rows_in_batch: int
) -> None:
    bad, others = numbered(1, 21, 14), neighbours(None)[: rows_in_batch - 1]
    model, expected, at = with_poison(tiny, bad, others)
    whole = {each.uid: [*each.prompt, *expected[each.uid]] for each in (bad, *others)}

    def propose(_: NgramProposer, rows: Sequence[DecodeRow], length: int) -> list[list[int]]:
        starts = [row.length + (row.next_input is not None) for row in rows]
        return [whole[row.uid][start:][:length] for row, start in zip(rows, starts, strict=True)]

    def draft_length(_: Speculation, rows: Sequence[DecodeRow]) -> int:
        return 2 if min(row.remaining if row.sampled else 0 for row in rows) > 2 else 0

    monkeypatch.setattr(NgramProposer, "propose", propose)
    monkeypatch.setattr(Speculation, "draft_length", draft_length)
    runner = runner_of(replace(tiny, model=model), speculation_tokens=16)
    tokens, failed = outcome(runner, [bad, *others])
    assert runner.stats()["speculation_accepted_tokens_total"] > 0
    assert list(failed) == [bad.uid] and isinstance(failed[bad.uid], InvalidLogits)
    written = tokens.pop(bad.uid, [])
    assert written == expected.pop(bad.uid)[: at + 1][: len(written)]
    assert tokens == expected


@pytest.mark.parametrize("alternatives", [None, 2])
@pytest.mark.parametrize("fill", FILLS)
def test_a_processor_that_leaves_no_token_fails_its_row(tiny: LoadedModel, fill: str, alternatives: int | None) -> None:
    bad, others = numbered(1, 21, 14, SAMPLED, logprobs=alternatives), neighbours(alternatives)
    expected = {each.uid: run(runner_of(tiny), [each])[each.uid] for each in (bad, *others)}
    runner = runner_of(tiny, processors=[Breaks(FILLS[fill], len(bad.prompt))])
    tokens, failed = outcome(runner, [others[0], bad, others[1]])
    assert list(failed) == [bad.uid] and isinstance(failed[bad.uid], InvalidLogits)
    written = tokens.pop(bad.uid)
    assert 0 < len(written) < 14 and written == expected.pop(bad.uid)[: len(written)]
    assert tokens == expected


def test_a_log_probability_that_is_not_a_number_fails_its_row(tiny: LoadedModel) -> None:
    """One logit of many is NaN, so the most likely token is a number, but its probability is not."""
    bad = numbered(1, 21, 8, logprobs=1)

    class OneBroken(Poisoned):
        def __call__(self, inputs: mx.array, **options: Any) -> mx.array:
            logits = self.model_of_folder(inputs, **options)
            return mx.where(mx.arange(logits.shape[-1]) == 7, float("nan"), logits)

    tokens, failed = outcome(runner_of(replace(tiny, model=OneBroken(tiny.model))), [bad])
    assert not tokens and isinstance(failed[bad.uid], InvalidLogits)


def test_the_job_says_that_the_model_produced_invalid_numbers(tiny: LoadedModel, tiny_model_path: Path) -> None:
    model = Poisoned(tiny.model)
    runner = runner_of(replace(tiny, model=model))
    good, bad = (
        engine.sequence_of(tiny_model_path, claimed(prompt, max_tokens=6, sampling=GREEDY), runner)
        for prompt in ("A good prompt", "A bad prompt!")
    )
    model.poison = bad.prompt.tokens[-1]
    assert model.poison not in good.prompt.tokens
    engine.run(runner, [good, bad])
    assert good.ending is not None and good.ending.status is Status.SUCCEEDED
    assert bad.ending is not None and (bad.ending.status, bad.ending.error_code) == (Status.FAILED, JobFailure.ROW)
    assert "invalid numbers" in (bad.ending.error_message or "")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(0.7, top_k=2), Sampling(0.7, min_p=0.1)], ids=str)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_the_sampler_marks_rows_without_a_best_token(sampling: Sampling, value: float, dtype: mx.Dtype) -> None:
    logits = mx.array([[1.0, 2.0, -mx.inf], [value] * 3, [3.0, -mx.inf, -mx.inf]], dtype)
    tokens = cast("list[int]", BatchSampler([sampling] * 3)(logits, [0, 1, 2]).tolist())
    assert tokens[0] in (0, 1) and tokens[1:] == [INVALID, 0]
