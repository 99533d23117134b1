"""What raises for one row of a real batch ends that row, and the others say what they would have said without it."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from shared.errors import JobFailure
from shared.jobs.record import Status
from shared.jobs.request import Sampling
from tests.plugins.work import claimed, sequence_for
from worker.engine.core import Batch
from worker.engine.sequence import Said, Sequence
from worker.models.load import load_model
from worker.runner import sampler
from worker.runner.logits import penalties
from worker.runner.memory import Memory
from worker.runner.model_runner import TextBackend

BAD_SEED = 666
NEIGHBOURS = (Sampling(0.0), Sampling(1.0, seed=4), Sampling(0.0, repetition_penalty=1.2), Sampling(0.8, top_p=0.9))


@pytest.fixture(scope="module")
def backend(tiny_model_path: Path) -> TextBackend:
    return TextBackend(load_model(tiny_model_path), 16, Memory(2**30, 2**26))


def neighbours(backend: TextBackend) -> list[Sequence]:
    return [job(backend, f"Neighbour {i} says what it has to say", each) for i, each in enumerate(NEIGHBOURS)]


def job(backend: TextBackend, prompt: str, sampling: Sampling) -> Sequence:
    asked = claimed(prompt, max_tokens=16)
    return sequence_for(replace(asked, generation=replace(asked.generation, sampling=sampling)), backend)


def run(backend: TextBackend, sequences: Many[Sequence]) -> list[str | None]:
    """All at once; the text of each that succeeded."""
    said: list[Said] = []
    engine = Batch(lambda: backend, 8, said.extend)
    engine.load()
    for sequence in sequences:
        engine.submit(sequence)
    engine.step()
    while engine.busy:
        engine.step()
    endings = [each.ending for each in sequences]
    return [ending.text if ending and ending.status is Status.SUCCEEDED else None for ending in endings]


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
    start = list(bad.prompt[:5])
    monkeypatch.setattr(penalties, "_padded", when(lambda tokens: tokens[:5] == start, penalties._padded))


def break_detokenizer(bad: Sequence, monkeypatch: pytest.MonkeyPatch) -> None:
    add = when(lambda token: len(bad.generated) > 5, bad._detokenizer.add)
    monkeypatch.setattr(bad._detokenizer, "add", add)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (break_sampler, JobFailure.ENGINE),
        (break_penalties, JobFailure.ENGINE),
        (break_detokenizer, JobFailure.ROW),
    ],
)
def test_a_fault_of_one_row_ends_it_alone(
    backend: TextBackend, monkeypatch: pytest.MonkeyPatch, fault: Any, code: JobFailure
) -> None:
    expected = run(backend, neighbours(backend))
    assert None not in expected
    bad = job(backend, "The bad one", Sampling(1.0, seed=BAD_SEED, presence_penalty=0.5))
    fault(bad, monkeypatch)
    others = neighbours(backend)
    assert run(backend, [*others[:2], bad, *others[2:]]) == [*expected[:2], None, *expected[2:]]
    assert bad.ending is not None
    assert (bad.ending.status, bad.ending.error_code) == (Status.FAILED, code)
    assert "of this row" not in (bad.ending.error_message or "")
