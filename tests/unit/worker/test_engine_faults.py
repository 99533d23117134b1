"""The engine recovers when a row, a step or the whole runner fails."""

from __future__ import annotations

import pytest

from shared.errors import JobFailure
from shared.jobs.record import Status
from tests.support.stepped_engine import SteppedEngine, alone
from worker.engine.scheduler import EngineBroken
from worker.runner.base import OutOfMemory, StepPlan


@pytest.fixture
def engine() -> SteppedEngine:
    return SteppedEngine()


def test_a_row_that_the_runner_fails_ends_alone(engine: SteppedEngine) -> None:
    bad, good = engine.submit("!row-fails=3"), engine.submit("good")
    engine.run()
    ending = engine.ending(bad)
    assert (ending.status, ending.error_code, ending.completion_tokens) == (Status.FAILED, JobFailure.ROW, 2)
    assert engine.text(good) == alone("good")


def test_a_row_whose_text_raises_ends_alone(engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = engine.submit("bad"), engine.submit("good")
    monkeypatch.setattr(bad.detokenizer, "add", lambda token: 1 / 0)
    engine.run()
    assert engine.ending(bad).error_code == JobFailure.ROW
    assert engine.text(good) == alone("good")


def test_a_lost_batch_fails_the_row_to_blame_and_no_other(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}", max_tokens=9) for i in range(3)]
    bad = engine.submit("!step-fails=4", max_tokens=9)
    engine.run()
    assert engine.ending(bad).error_code == JobFailure.ENGINE
    assert [engine.text(row) for row in rows] == [alone(f"row {i}", max_tokens=9) for i in range(3)]


def test_an_error_that_no_single_row_causes_fails_none(engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a tensor that the fourth row makes too large."""
    step = engine.runner.execute

    def limited(plan: StepPlan) -> object:
        if len(engine.runner._rows) > 3:
            raise RuntimeError
        return step(plan)

    monkeypatch.setattr(engine.runner, "execute", limited)
    rows = [engine.submit(f"row {i}", max_tokens=4) for i in range(4)]
    engine.run()
    assert [engine.text(row) for row in rows] == [alone(f"row {i}", max_tokens=4) for i in range(4)]


def test_a_job_that_never_fits_into_memory_fails_at_once() -> None:
    engine = SteppedEngine(memory=60)
    before = engine.submit("before", max_tokens=8)
    never = [engine.submit("x" * 20, max_tokens=41) for _ in range(5)]
    after = engine.submit("after", max_tokens=8)
    engine.core.step()
    for row in never:
        ending = engine.ending(row)
        assert (ending.status, ending.error_code) == (Status.FAILED, JobFailure.MEMORY)
    engine.run()
    assert [engine.text(row) for row in (before, after)] == [alone(p, max_tokens=8) for p in ("before", "after")]


def test_rows_that_run_out_of_memory_in_succession_do_not_break_the_engine(engine: SteppedEngine) -> None:
    for i in range(5):
        row = engine.submit(f"!no-memory=1 {i}")
        engine.run()
        assert engine.ending(row).error_code == JobFailure.MEMORY
    good = engine.submit("good")
    engine.run()
    assert engine.text(good) == alone("good")


def test_a_batch_that_is_too_large_is_halved_and_grows_again(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SteppedEngine(slots=8)
    step, sizes = engine.runner.execute, []

    def limited(plan: StepPlan) -> object:
        sizes.append(len(engine.runner._rows))
        if len(sizes) == 3:
            raise OutOfMemory
        return step(plan)

    monkeypatch.setattr(engine.runner, "execute", limited)
    rows = [engine.submit(f"row {i}", max_tokens=5) for i in range(20)]
    engine.run()
    assert [engine.text(row) for row in rows] == [alone(f"row {i}", max_tokens=5) for i in range(20)]
    assert sizes[2] == 8
    assert sizes[3] == 4
    assert max(sizes[4:]) == 8


def test_a_runner_that_always_raises_breaks_the_engine_before_all_rows_fail(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.runner, "execute", lambda plan: 1 / 0)
    rows = [engine.submit(f"row {i}") for i in range(4)]
    with pytest.raises(EngineBroken):
        engine.run()
    assert sum(row.ending is None for row in rows) == 2
