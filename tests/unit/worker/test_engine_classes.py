"""Rows of the class `batch` do not delay rows of other classes."""

from __future__ import annotations

from itertools import count

import pytest

from shared.jobs.record import Priority
from tests.plugins.work import claimed, sequence_for
from tests.support.stepped_engine import SteppedEngine, alone
from worker.engine.scheduler import LONG_STEP_S, Capacity, Scheduler
from worker.engine.sequence import Sequence
from worker.runner.base import StepOutput, TokenOutput
from worker.runner.fake import FakeRunner


def submit(engine: SteppedEngine, name: str, priority: Priority = Priority.BATCH, max_tokens: int = 40) -> Sequence:
    return engine.submit(name, max_tokens=max_tokens, priority=priority, rank=priority * 1e6)


def fill(engine: SteppedEngine, rows: int) -> list[Sequence]:
    """Submit rows of the class `batch` and let them generate tokens."""
    batch = [submit(engine, f"batch {number}") for number in range(rows)]
    for _ in range(5):
        engine.core.step()
    return batch


def running(engine: SteppedEngine) -> list[str]:
    return [job.removeprefix("job_") for job in engine.traced[-1]]


@pytest.mark.parametrize("priority", [Priority.NORMAL, Priority.HIGH])
def test_a_row_of_another_class_starts_at_once(priority: Priority) -> None:
    engine = SteppedEngine(slots=3)
    batch = fill(engine, 4)
    urgent = submit(engine, "urgent", priority)
    engine.core.step()
    assert running(engine) == ["batch 0", "batch 1", "urgent"], "the newest row has left"
    assert (engine.core._scheduler.yielded, engine.core._scheduler.preemptions) == (1, 0)
    engine.run()
    for number, row in enumerate(batch):
        assert engine.text(row) == alone(f"batch {number}", max_tokens=40), "it continues later"
        assert engine.ending(row).completion_tokens == 40
    assert engine.text(urgent) == alone("urgent", max_tokens=40)


def test_a_row_of_another_class_gets_the_memory_of_the_batch() -> None:
    engine = SteppedEngine(slots=8, memory=250)
    fill(engine, 4)
    urgent = submit(engine, "u" * 100, Priority.NORMAL)
    engine.core.step()
    assert urgent.started and len(running(engine)) < 5
    engine.run()


def test_no_row_is_preempted_for_one_that_would_not_fit_without_it() -> None:
    engine = SteppedEngine(slots=8, memory=400)
    first = submit(engine, "f" * 250, Priority.NORMAL)
    engine.core.step()
    fill(engine, 1)
    large = submit(engine, "l" * 200, Priority.NORMAL)
    engine.core.step()
    assert not large.started and len(running(engine)) == 2
    engine.run()
    assert first.ending and large.ending


def test_rows_of_the_batch_leave_the_reserve_free_until_others_have_left() -> None:
    engine = SteppedEngine(slots=4, reserve=2)
    assert engine.core.capacity() == Capacity(4, 1_000_000_000, reserve=2)
    fill(engine, 4)
    assert running(engine) == ["batch 0", "batch 1"]
    others = [submit(engine, f"other {number}", Priority.NORMAL, max_tokens=8) for number in range(3)]
    engine.core.step()
    assert running(engine) == ["batch 0", "other 0", "other 1", "other 2"]
    while not all(row.ending for row in others):
        assert "batch 1" not in running(engine)
        engine.core.step()
    engine.core.step()
    assert running(engine) == ["batch 0", "batch 1"]


def test_rows_of_the_batch_run_although_few_rows_fit_after_a_lack_of_memory() -> None:
    engine = SteppedEngine(slots=8, reserve=4)
    batch = [submit(engine, f"!no-memory=3 {number}") for number in range(2)]
    batch += [submit(engine, f"batch {number}") for number in range(2)]
    engine.run()
    assert all(row.ending for row in batch)


def test_prompts_of_the_batch_are_prefilled_last() -> None:
    engine = SteppedEngine(slots=8)
    rows = [submit(engine, "batch"), submit(engine, "urgent", Priority.NORMAL)]
    engine.core.step()
    assert [len(row.generated) for row in rows] == [0, 1]
    engine.core.step()
    assert [len(row.generated) for row in rows] == [1, 2]


def test_a_batch_job_whose_turn_it_is_counts_like_others() -> None:
    engine = SteppedEngine(slots=4, reserve=2)
    fill(engine, 4)
    engine.submit("turn", max_tokens=40, priority=Priority.BATCH, rank=-1.0)
    engine.core.step()
    assert "turn" in running(engine)


@pytest.mark.parametrize("step_s", [0.049, 0.051])
@pytest.mark.parametrize("priority", [Priority.NORMAL, Priority.BATCH])
def test_long_steps_do_not_run_ahead_beside_a_batch(step_s: float, priority: Priority) -> None:
    clock = iter(count(0, step_s))
    scheduler = Scheduler(FakeRunner(), 4, lambda: next(clock))
    scheduler.add(row := sequence_for(claimed("x", max_tokens=40, priority=priority), FakeRunner()))
    scheduler.schedule()
    for _ in range(4):
        scheduler.update(StepOutput(tokens=[TokenOutput(row.uid, 1)]))
    assert scheduler.plan({}, None).ahead is not (step_s > LONG_STEP_S and priority is Priority.BATCH)
