"""Speculative decoding on every kind of architecture: drafts change no token, whether they are right or wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.request import Sampling
from shared.models.registry import ModelCard
from tests.support.architecture_configs import VOCABULARY, config
from tests.support.architectures import make, measured, names
from tests.support.drafting import answers, counts, drafting, every_fifth, run
from tests.support.runner import GREEDY, row
from worker.models.load import LoadedModel
from worker.runner.base import Row
from worker.runner.batching.proof import CannotRun
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

CHUNK = 32
SAMPLED = Sampling(1.5, seed=11)
KINDS = ("gemma3_text", "deepseek_v32", "qwen3_5", "mamba2")
"""One of each kind. `tests/architectures` has more of them by default."""


@pytest.fixture(params=[*KINDS, *(pytest.param(name, marks=pytest.mark.long) for name in names() if name not in KINDS)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def runners(name: str) -> tuple[MLXRunner, MLXRunner]:
    """Return runners of a tiny model, without and with speculation."""
    try:
        model = make(name)
        batching = measured(model)
    except (CannotRun, RuntimeError, TypeError) as error:
        pytest.skip(str(error))
    if not batching.speculates:
        pytest.skip("it does not speculate")
    card = ModelCard(name, "text", 512, vocabulary=config(name)["vocab_size"])
    loaded = LoadedModel(model, None, config(name), card, frozenset())
    plain, speculating = (
        MLXRunner(loaded, CHUNK, Memory(2**30, 2**28), batching=batching, speculation_tokens=tokens)
        for tokens in (0, 16)
    )
    if not speculating._speculation.supported:
        pytest.skip("mlx-lm has no batch cache for it")
    return plain, speculating


def rows(count: int, max_new_tokens: int) -> list[Row]:
    prompts = [[(uid * 89 + i * 37) % VOCABULARY for i in range(20 + 7 * uid)] for uid in range(count)]
    samplings = (SAMPLED, GREEDY)
    return [row(uid, prompt, max_new_tokens, samplings[uid % 2]) for uid, prompt in enumerate(prompts)]


@pytest.mark.parametrize("wrong", [lambda _: False, every_fifth, lambda _: True], ids=["right", "mixed", "wrong"])
def test_drafts_change_no_token(name: str, wrong: Callable[[int], bool]) -> None:
    plain, runner = runners(name)
    one = rows(1, 90)
    expected = answers(plain, one)
    with drafting(one, expected, wrong):
        assert run(runner, one) == expected
    drafted, accepted = counts(runner)
    assert drafted > 50
    kinds = {wrong(index) for index in range(9)}
    assert (accepted == drafted, accepted == 0) == (kinds == {False}, kinds == {True})


def test_rows_that_accept_different_numbers_of_tokens_stay_exact(name: str) -> None:
    plain, runner = runners(name)
    some = rows(3, 60)
    expected = answers(plain, some)
    with drafting(some, expected, lambda index: index % 7 == 3):
        assert run(runner, some) == expected
