"""What raises for one row of a real batch ends that row, and the others say what they would have said without it."""

from __future__ import annotations

from collections.abc import Sequence as Many
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
    """A runner, and the folder of its model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runner = MLXRunner(load_model(folder), 16, Memory(2**30, 2**26))

    def job(self, prompt: str, sampling: Sampling) -> Sequence:
        return engine.sequence_of(self.folder, claimed(prompt, max_tokens=16, sampling=sampling), self.runner)

    def neighbours(self) -> list[Sequence]:
        return [self.job(f"Neighbour {i} says what it has to say", each) for i, each in enumerate(NEIGHBOURS)]

    def run(self, sequences: Many[Sequence]) -> list[str | None]:
        """All at once; the text of each that succeeded."""
        texts = engine.run(self.runner, sequences)
        return [
            text if sequence.ending and sequence.ending.status is Status.SUCCEEDED else None
            for sequence, text in texts.items()
        ]


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> Model:
    return Model(tiny_model_path)


def when(condition: Any, then: Any) -> Any:
    """A function that raises when its arguments are those of the bad row."""

    def function(*args: Any) -> Any:
        if condition(*args):
            raise ValueError("of this row")
        return then(*args)

    return function


def break_sampler(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    later = when(lambda seed, position: seed == BAD_SEED and position > 5, sampler._key)
    monkeypatch.setattr(sampler, "_key", later)


def break_penalties(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    start = list(bad.prompt.tokens[:5])
    monkeypatch.setattr(penalties, "_padded", when(lambda tokens: tokens[:5] == start, penalties._padded))


def break_detokenizer(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    add = when(lambda token: len(bad.generated) > 5, bad.detokenizer.add)
    monkeypatch.setattr(bad.detokenizer, "add", add)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (break_sampler, JobFailure.ENGINE),
        (break_penalties, JobFailure.ROW),
        (break_detokenizer, JobFailure.ROW),
    ],
)
def test_a_fault_of_one_row_ends_it_alone(
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
    assert "of this row" not in (bad.ending.error_message or "")
