"""Drafts of a small model: the same text, greedy and sampled, and almost no cost if they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx.utils import tree_map

from shared.jobs.request import Sampling
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.settings import Settings
from tests.support.drafting import answers, counts, run
from tests.support.runner import GREEDY, numbered
from worker.models.load import LoadedModel, load_model
from worker.runner import loading
from worker.runner.base import Row
from worker.runner.decode_row import DecodeRow
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.speculation.draft_model import PAUSE_STEPS, PROBE_TOKENS, DraftModelProposer
from worker.runner.speculation.pass_cost import PassCost

CHUNK = 16
SAMPLINGS = (GREEDY, Sampling(1.0, seed=11), Sampling(0.8, top_p=0.9, seed=2**63), Sampling(1.2, top_k=40, seed=-5))
CHEAP = PassCost({1: 1.0, 17: 1.2})
"""A pass over many tokens costs hardly more than one, as on a GPU."""


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture(scope="module")
def different(tiny_model_path: Path) -> LoadedModel:
    """A model with other weights, whose drafts are nearly all wrong."""
    loaded = load_model(tiny_model_path)
    loaded.model.update(tree_map(lambda array: array + mx.random.normal(array.shape), loaded.model.parameters()))
    return loaded


def runner(tiny: LoadedModel, draft: LoadedModel | None, token_s: float = 0.1) -> MLXRunner:
    made = MLXRunner(tiny, CHUNK, Memory(2**30, 2**28), speculation_tokens=16, draft=draft)
    made._speculation.cost = CHEAP
    if made._draft is not None:
        made._draft.token_s = token_s
    return made


def rows(count: int, tokens: int) -> list[Row]:
    return [numbered(uid, 21 + 9 * uid, tokens, SAMPLINGS[uid]) for uid in range(count)]


@pytest.mark.parametrize("count", [1, 3])
def test_the_model_accepts_all_drafts_of_itself(tiny: LoadedModel, count: int) -> None:
    some = rows(count, 60)
    expected = answers(MLXRunner(tiny, CHUNK), some)
    drafting = runner(tiny, tiny)
    assert run(drafting, some) == expected
    drafted, accepted = counts(drafting)
    assert accepted == drafted > 40 * count


def test_wrong_drafts_change_no_token_and_soon_pause(tiny: LoadedModel, different: LoadedModel) -> None:
    some = rows(1, PAUSE_STEPS // 2)
    expected = answers(MLXRunner(tiny, CHUNK), some)
    drafting, passes = runner(tiny, different), list[Any]()
    draft = drafting._draft
    assert draft is not None
    propose = draft.propose
    draft.propose = lambda rows, length: (passes.append(length), propose(rows, length))[1]  # type: ignore[method-assign]
    assert run(drafting, some) == expected
    assert 0 < len(passes) <= 8


STEPS = 1.2
"""What drafting and verifying two tokens costs in `attempts`, in decode steps."""


def attempts(draft: DraftModelProposer, steps: int, accepted: Callable[[int], int] = lambda _: 0) -> list[int]:
    """Draft two tokens whenever that seems worthwhile. Returns the steps in which it did.

    Args:
        accepted: the number of accepted tokens, by step.
    """
    row: Any = type("Stub", (), {"row": numbered(1, 5)})()
    made = []
    for step in range(steps):
        (expected,) = draft.expected([row], 16)
        if expected and (1 + expected[1]) / STEPS > 1.1:
            draft.record(2, accepted(step))
            made.append(step)
    return made


def test_pauses_make_wrong_drafts_cost_less_than_one_percent(tiny: LoadedModel) -> None:
    draft = DraftModelProposer(tiny.model, 10)
    assert 0 < STEPS * len(attempts(draft, 50_000)) < 0.01 * 50_000


def test_pauses_are_short_again_once_a_draft_model_has_helped(tiny: LoadedModel) -> None:
    draft = DraftModelProposer(tiny.model, 10)
    made = attempts(draft, 6_000, lambda step: 2 * (1_000 < step < 2_000))
    pauses = [later - step - 1 for step, later in pairwise(made) if later - step > 1]
    assert pauses[:4] == [PAUSE_STEPS, 2 * PAUSE_STEPS, PAUSE_STEPS, 2 * PAUSE_STEPS]


def test_after_a_pause_the_draft_model_reads_only_the_end_of_a_row(tiny: LoadedModel) -> None:
    draft, row = DraftModelProposer(tiny.model, 49152), DecodeRow.after_prefill(numbered(1, 300, 40))
    while not draft.prepare([row]):
        pass
    draft.propose([row], 2)
    assert len(draft._drafts[1].ids) == 301
    for _ in range(10):
        draft.record(2, 0)
    assert draft.prepare([row])
    draft.propose([row], 2)
    assert len(draft._drafts[1].ids) == PROBE_TOKENS + 2


def test_long_prompts_reach_the_draft_model_in_parts(tiny: LoadedModel) -> None:
    one = numbered(1, 900, 40)
    expected = answers(MLXRunner(tiny, CHUNK), [one])
    drafting = runner(tiny, tiny)
    assert run(drafting, [one]) == expected
    assert counts(drafting)[1] > 10
    assert drafting.row_bytes(900) == 2 * MLXRunner(tiny, CHUNK).row_bytes(900)


def load(settings: Settings, model: CatalogModel) -> MLXRunner:
    steps = loading.load(settings, model)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: MLXRunner = end.value
            return made


def test_a_catalog_entry_names_the_draft_model(tiny_model_path: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, _env_file=None)
    model = CatalogModel("tiny", tiny_model_path, "text", draft=tiny_model_path)
    made = load(settings, model)
    assert made._draft is not None and made._draft.token_s > 0
    assert made.weights_bytes == 2 * load(settings, replace(model, draft=None)).weights_bytes
    assert model.measure() == 2 * replace(model, draft=None).measure()


def test_a_draft_model_with_another_tokenizer_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model_path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("hello", "hullo"))
    model = CatalogModel("tiny", tiny_model_path, "text", draft=other)
    with pytest.raises(ModelError, match="draft_model"):
        load(Settings(data_dir=tmp_path, _env_file=None), model)
