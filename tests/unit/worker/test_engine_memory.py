"""The engine admits, preempts and retries rows by the free memory."""

from __future__ import annotations

import pytest

from shared.errors import JobFailure
from shared.jobs.record import Status
from shared.queue.claims import WriteResult
from tests.support.stepped_engine import SteppedEngine, alone
from worker.engine.core import EngineCore
from worker.engine.scheduler import OVERTAKE_LIMIT_S
from worker.runner.base import StepOutput, StepPlan
from worker.runner.fake import FakeRunner


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scheduler's clock, in seconds."""
    moment = [1000.0]
    monkeypatch.setattr("worker.engine.scheduler.time.monotonic", lambda: moment[0])
    return moment


def test_rows_are_admitted_by_their_expected_length() -> None:
    engine = SteppedEngine(slots=8, memory=4000)
    for i in range(8):
        engine.submit(f"!words=9 {i}", max_tokens=3000)
    engine.core.step()
    assert engine.core.slots_used == 8


def test_a_row_that_does_not_fit_is_overtaken_until_memory_is_reserved_for_it(now: list[float]) -> None:
    engine = SteppedEngine(slots=8, memory=400)
    running = engine.submit("r" * 100, max_tokens=50)
    engine.core.step()
    large = engine.submit("l" * 300, max_tokens=8, rank=1)
    small = [engine.submit(f"{i}", max_tokens=3, rank=2) for i in range(2)]
    engine.core.step()
    assert all(row.started for row in small) and not large.started
    now[0] += OVERTAKE_LIMIT_S - 0.1
    overtaking = engine.submit("3", max_tokens=3, rank=2)
    engine.core.step()
    assert overtaking.started
    now[0] += 0.2
    blocked = engine.submit("4", max_tokens=3, rank=2)
    while running.ending is None:
        engine.core.step()
        assert not blocked.started
    engine.run()
    starts = [output.sequence for output in engine.published if output.started]
    assert starts[-2:] == [large, blocked]


def test_a_preempted_row_continues_with_the_same_text() -> None:
    engine = SteppedEngine(slots=8, memory=1500)
    rows = [engine.submit(f"row {i}", max_tokens=900) for i in range(3)]
    engine.run()
    for i, row in enumerate(rows):
        ending = engine.ending(row)
        assert (engine.text(row), ending.completion_tokens) == (alone(f"row {i}", max_tokens=900), 900)
    assert engine.core._scheduler.preemptions > 0
    assert [output.sequence for output in engine.published if output.ending] == rows
    assert [output.sequence for output in engine.published if output.started] == rows


def test_the_memory_limit_is_never_exceeded() -> None:
    engine = SteppedEngine(slots=8, memory=2000)
    for i in range(8):
        engine.submit(f"row {i}", max_tokens=400 + 37 * i)
    engine.core.step()
    while engine.core.busy:
        used = sum(len(row.row.prompt) + row.position - row.row.generated for row in engine.runner._rows.values())
        assert used <= 2000
        engine.core.step()


def test_the_expected_length_follows_finished_answers() -> None:
    engine = SteppedEngine(slots=8, memory=3000)
    for i in range(40):
        engine.submit(f"!words=900 {i}", max_tokens=2000)
    engine.run()
    preempted = engine.core._scheduler.preemptions
    assert preempted > 0
    rows = [engine.submit(f"!words=900 more {i}", max_tokens=2000) for i in range(8)]
    engine.core.step()
    assert sum(row.started for row in rows) == 3


def test_prefixes_may_use_the_memory_that_rows_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(FakeRunner, "set_prefix_limit", lambda _, max_bytes: limits.append(max_bytes))
    engine = SteppedEngine(memory=1000)
    engine.submit("x" * 100, max_tokens=50)
    engine.core.step()
    assert (limits[0], limits[-1]) == (1000, 850)
    engine.run()
    assert limits[-1] == 1000
    engine.core.set_cache_limit(300)
    assert limits[-1] == 300


def test_rows_keep_memory_that_is_granted_to_another_model_for_a_while() -> None:
    engine = SteppedEngine(memory=1000)
    row = engine.submit("x" * 100, max_tokens=500)
    engine.core.step()
    engine.core.set_cache_limit(10, 1000)
    waiting = engine.submit("y", max_tokens=20)
    for _ in range(50):
        engine.core.step()
    assert len(row.generated) > 40 and not waiting.started
    engine.core.set_cache_limit(1000)
    engine.run()
    assert waiting.ending and waiting.ending.status is Status.SUCCEEDED


class LimitedPrefill(FakeRunner):
    """Has memory to prefill two rows at a time, and none for a prompt that contains "never"."""

    def execute(self, plan: StepPlan) -> StepOutput:
        uids = plan.prefill.uids if plan.prefill else ()
        never = [uid for uid in uids if b"never" in bytes(self._rows[uid].row.prompt)]
        if len(uids) > 2 or never:
            self.remove(uids)
            return StepOutput(out_of_memory=uids)
        return super().execute(plan)


def test_rows_whose_prefill_runs_out_of_memory_are_prefilled_alone() -> None:
    engine = SteppedEngine()
    engine.runner = LimitedPrefill()
    engine.core = EngineCore(lambda: engine.runner, 4, engine.published.extend)
    engine.core.load()
    prompts = ["one", "two", "never", "three"]
    rows = [engine.submit(prompt) for prompt in prompts]
    engine.run()
    assert engine.ending(rows[2]).error_code == JobFailure.MEMORY
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt == "never" or engine.text(row) == alone(prompt)


def test_a_row_that_is_cancelled_before_its_second_prefill_is_not_inserted() -> None:
    engine = SteppedEngine()
    engine.runner = LimitedPrefill()
    engine.core = EngineCore(lambda: engine.runner, 4, engine.published.extend)
    engine.core.load()
    row = engine.submit("never")
    engine.core.step()
    engine.core.apply_write_result(row.job.id, 1, WriteResult.CANCELLED)
    engine.core.step()
    assert not engine.runner._rows
    assert engine.ending(row).status is Status.CANCELLED
