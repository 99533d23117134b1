"""Rows with more different adapters than there are slots wait without blocking others."""

from __future__ import annotations

import pytest

from shared.jobs.record import Priority, Status
from tests.support.stepped_engine import SteppedEngine, alone
from worker.engine import scheduler
from worker.engine.sequence import Sequence

NAMES = ("a", "b", "c")


@pytest.fixture
def engine() -> SteppedEngine:
    return SteppedEngine(slots=8, adapters=NAMES, adapter_slots=2)


def running(engine: SteppedEngine) -> set[str]:
    return {job.removeprefix("job_") for job in engine.traced[-1]} if engine.traced else set()


def test_each_adapter_gives_its_own_answer(engine: SteppedEngine) -> None:
    rows = {name: engine.submit("same !words=5", adapter=name) for name in NAMES}
    plain = engine.submit("same !words=5")
    engine.run()
    texts = {engine.text(row) for row in (*rows.values(), plain)}
    assert len(texts) == 4
    assert engine.text(plain) == alone("same !words=5")
    assert engine.text(rows["b"]) == alone("same !words=5", adapter="b")


def test_a_row_waits_for_a_slot_while_others_run(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"{name} !words={words}", adapter=name) for name, words in (("a", 9), ("b", 4), ("c", 3))]
    again, plain = engine.submit("again !words=3", adapter="a"), engine.submit("plain !words=3")
    engine.core.step()
    assert running(engine) == {"a !words=9", "b !words=4", "again !words=3", "plain !words=3"}
    engine.run()
    assert {engine.ending(row).status for row in (*rows, again, plain)} == {Status.SUCCEEDED}
    both = [jobs for jobs in engine.traced if "job_c !words=3" in jobs]
    assert both and all("job_b !words=4" not in jobs for jobs in both), "c took the slot of b"


def test_a_row_that_has_waited_long_is_overtaken_only_by_rows_without_an_adapter(
    engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in (("a", 6), ("b", 6)):
        engine.submit(f"{name} !words={words}", max_tokens=20, adapter=name)
    engine.submit("c !words=3", adapter="c")
    engine.core.step()
    monkeypatch.setattr(scheduler, "OVERTAKE_LIMIT_S", 0.0)
    engine.submit("late !words=3", adapter="a")
    engine.submit("plain !words=3")
    engine.core.step()
    assert running(engine) == {"a !words=6", "b !words=6", "plain !words=3"}
    engine.run()


def test_rows_that_lack_a_slot_leave_room_for_claims() -> None:
    engine = SteppedEngine(slots=4, adapters=NAMES, adapter_slots=1)
    engine.submit("a !words=9", max_tokens=20, adapter="a")
    for number in range(3):
        engine.submit(f"b{number} !words=2", adapter="b")
    engine.core.step()
    assert running(engine) == {"a !words=9"}
    assert engine.core.capacity().rows == 2, "half of the slots at most"
    engine.run()
    assert engine.core.capacity().rows == 4


def test_a_batch_row_gives_its_slot_to_a_row_of_a_higher_class() -> None:
    engine = SteppedEngine(slots=4, adapters=NAMES, adapter_slots=1)
    batch: Sequence = engine.submit("batch !words=6", priority=Priority.BATCH, adapter="a")
    engine.core.step()
    urgent = engine.submit("urgent !words=2", adapter="b")
    engine.core.step()
    assert running(engine) == {"urgent !words=2"}
    engine.run()
    assert engine.text(batch) == alone("batch !words=6", adapter="a"), "it continued"
    assert engine.ending(urgent).status is Status.SUCCEEDED
