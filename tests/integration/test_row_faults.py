"""An error in one row of a real batch fails only that row; the others generate the same text as without it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from shared.errors import JobFailure
from shared.jobs.record import Status
from shared.jobs.request import Sampling
from tests.plugins.work import claimed
from tests.support import engine
from worker.engine.sequence import Sequence
from worker.models.load import load_model
from worker.runner import sampler
from worker.runner.logits import penalties
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

BAD_SEED = 666
NEIGHBOURS = (Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.0, repetition_penalty=1.2), Sampling(0.8, top_p=0.9))


class Model:
    """A runner and the folder of its model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runner = MLXRunner(load_model(folder), 16, Memory(2**30, 2**26))

    def job(self, prompt: str, sampling: Sampling) -> Sequence:
        return engine.sequence_of(self.folder, claimed(prompt, max_tokens=16, sampling=sampling), self.runner)

    def neighbours(self) -> list[Sequence]:
        return [self.job(f"Neighbour {i} continues this text", each) for i, each in enumerate(NEIGHBOURS)]

    def run(self, sequences: Iterable[Sequence]) -> list[str | None]:
        """Submit all sequences at once. Returns their texts; None for each that failed."""
        texts = engine.run(self.runner, sequences)
        return [
            text if sequence.ending and sequence.ending.status is Status.SUCCEEDED else None
            for sequence, text in texts.items()
        ]


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Model:
    return Model(tiny_model_path)


def raise_if(condition: Any, function: Any) -> Any:
    """Wrap a function to raise if its arguments meet a condition."""

    def wrapper(*args: Any) -> Any:
        if condition(*args):
            raise ValueError("this row fails")
        return function(*args)

    return wrapper


def break_sampler(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = raise_if(lambda seed, position: seed == BAD_SEED and position > 5, sampler._key)
    monkeypatch.setattr(sampler, "_key", broken)


def break_penalties(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    start = list(bad.prompt.tokens[:5])
    monkeypatch.setattr(penalties, "_padded", raise_if(lambda tokens: tokens[:5] == start, penalties._padded))


def break_detokenizer(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    add = raise_if(lambda token: len(bad.generated) > 5, bad.detokenizer.add)
    monkeypatch.setattr(bad.detokenizer, "add", add)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (break_sampler, JobFailure.ENGINE),
        (break_penalties, JobFailure.ROW),
        (break_detokenizer, JobFailure.ROW),
    ],
)
def test_an_error_in_one_row_fails_only_that_row(
    model: Model, monkeypatch: pytest.MonkeyPatch, fault: Any, code: JobFailure
) -> None:
    expected = model.run(model.neighbours())
    assert None not in expected
    bad = model.job("The bad one", Sampling(1.0, seed=BAD_SEED, presence_penalty=0.5))
    fault(bad, monkeypatch)
    others = model.neighbours()
    assert model.run([*others[:2], bad, *others[2:]]) == [*expected[:2], None, *expected[2:]]
    assert bad.ending is not None
    assert (bad.ending.status, bad.ending.error_code) == (Status.FAILED, code)
    assert "this row fails" not in (bad.ending.error_message or "")
