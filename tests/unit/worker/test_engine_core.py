"""The engine of one model, step by step, on the fake runner."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from shared.jobs.record import Status
from shared.queue.claims import WriteResult
from tests.plugins.work import claimed, sequence_for
from tests.support.stepped_engine import SteppedEngine, alone
from worker.engine.core import EngineCore
from worker.engine.scheduler import Capacity
from worker.engine.sequence import Outcome
from worker.runner.base import StepOutput, StepPlan
from worker.runner.fake import FakeRunner


class Several(FakeRunner):
    """Gives each row the tokens of three steps at once, even after its end, as speculative decoding may."""

    def execute(self, plan: StepPlan) -> StepOutput:
        first = super().execute(plan)
        others = [super(Several, self).execute(StepPlan()) for _ in range(2)]
        return replace(first, tokens=[token for each in (first, *others) for token in each.tokens])


@pytest.fixture
def engine() -> SteppedEngine:
    return SteppedEngine()


def test_rows_join_and_leave_while_others_run(engine: SteppedEngine) -> None:
    first = engine.submit("first", max_tokens=6)
    engine.core.step()
    second = engine.submit("second", max_tokens=2)
    engine.core.step()
    assert engine.core.slots_used == 2
    engine.core.step()
    assert (engine.core.slots_used, second.ending is None) == (1, False)
    engine.run()
    assert engine.text(first) == alone("first", max_tokens=6)
    assert engine.text(second) == alone("second", max_tokens=2)
    assert engine.core.totals.tokens == 8


@pytest.mark.parametrize("prompt", ["!words=7 end", "limit"])
@pytest.mark.parametrize("stop", [(), ("e",)], ids=str)
def test_a_row_may_get_several_tokens_per_step_and_none_after_its_end(prompt: str, stop: tuple[str, ...]) -> None:
    engine = SteppedEngine()
    engine.runner = Several()
    engine.core = EngineCore(lambda: engine.runner, 4, engine.published.extend)
    engine.core.load()
    rows = [engine.submit(f"{prompt} {i}", max_tokens=10 + i, stop=stop) for i in range(3)]
    engine.run()
    for i, row in enumerate(rows):
        assert engine.text(row) == alone(f"{prompt} {i}", max_tokens=10 + i, stop=stop)
        assert [output.outcome for output in engine.published if output.sequence is row].count(Outcome.ENDED) == 1
    totals = engine.core.totals
    assert totals.tokens == sum(engine.ending(row).completion_tokens for row in rows)
    assert totals.last_batch <= 3


def test_rows_without_a_slot_wait_in_order(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}", max_tokens=3) for i in range(9)]
    engine.core.step()
    assert engine.core.slots_used == 4
    engine.run()
    ends = [output.sequence for output in engine.published if output.ending]
    assert ends == rows


@pytest.mark.parametrize(
    ("write_result", "status"), [(WriteResult.CANCELLED, Status.CANCELLED), (WriteResult.EXPIRED, Status.EXPIRED)]
)
def test_a_stopped_row_frees_its_slot_at_the_next_step(
    engine: SteppedEngine, write_result: WriteResult, status: Status
) -> None:
    stopped, *others = [engine.submit(f"row {i}", max_tokens=9) for i in range(4)]
    engine.core.step()
    late = engine.submit("late", max_tokens=2)
    engine.core.apply_write_result(stopped.job.id, 1, write_result)
    engine.core.step()
    assert stopped.uid not in {token.uid for token in engine.runner.execute(StepPlan()).tokens}
    assert engine.ending(stopped).status is status
    assert len(late.generated) == 1
    engine.run()
    assert all(engine.ending(row).status is Status.SUCCEEDED for row in (*others, late))


def test_the_end_is_published_after_the_slot_is_free(engine: SteppedEngine) -> None:
    used: list[int] = []
    batch = EngineCore(lambda: engine.runner, 4, lambda published: used.append(batch.slots_used))
    batch.load()
    batch.submit(sequence_for(claimed(max_tokens=1), engine.runner))
    batch.step()
    assert used == [1, 0], "the start, then the end"


def test_a_waiting_row_is_cancelled_without_a_start(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}") for i in range(5)]
    engine.core.step()
    engine.core.apply_write_result(rows[4].job.id, 1, WriteResult.CANCELLED)
    engine.core.step()
    assert engine.ending(rows[4]).completion_tokens == 0


def test_a_result_for_another_attempt_or_an_unknown_job_changes_nothing(engine: SteppedEngine) -> None:
    row = engine.submit("row")
    engine.core.step()
    engine.core.apply_write_result(row.job.id, 7, WriteResult.CANCELLED)
    engine.core.apply_write_result("job_other", 1, WriteResult.FENCED)
    engine.run()
    assert engine.ending(row).status is Status.SUCCEEDED


def test_a_fenced_row_is_dropped_without_output(engine: SteppedEngine) -> None:
    row = engine.submit("row")
    engine.core.step()
    engine.core.apply_write_result(row.job.id, 1, WriteResult.FENCED)
    before = len(engine.published)
    engine.core.step()
    assert (row.outcome, engine.core.slots_used, len(engine.published)) == (Outcome.FENCED, 0, before)


def test_a_drain_hands_back_waiting_rows_and_finishes_running_ones(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}", max_tokens=3) for i in range(6)]
    engine.core.step()
    engine.core.drain(60)
    late = engine.submit("late")
    engine.run()
    assert [row.ending is not None for row in rows] == [True] * 4 + [False] * 2
    back = [output.sequence for output in engine.published if output.outcome is Outcome.HANDED_BACK]
    assert back == [*rows[4:], late]


def test_a_drain_hands_back_rows_that_take_too_long(engine: SteppedEngine) -> None:
    row = engine.submit("row", max_tokens=1000)
    engine.core.step()
    engine.core.drain(0)
    engine.core.step()
    assert not engine.core.busy
    assert engine.published[-1].outcome is Outcome.HANDED_BACK
    assert row.ending is None


def test_gauges_are_not_read_at_every_step(engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []
    monkeypatch.setattr(engine.runner, "stats", lambda: readings.append(1) or {})
    engine.submit("row", max_tokens=50)
    engine.run()
    assert len(readings) < engine.core.totals.steps / 2


def test_a_step_without_output_is_no_progress(engine: SteppedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("worker.engine.core.time.monotonic", lambda: float(next(clock)))
    row = engine.submit("!stall=3", max_tokens=9)
    seen = []
    for _ in range(8):
        engine.core.step()
        seen.append(engine.core.progress_at)
    assert [before < after for before, after in itertools.pairwise(seen)] == [True] + [False] * 6
    engine.core.apply_write_result("job_other", 1, WriteResult.CANCELLED)
    engine.core.step()
    assert engine.core.progress_at == seen[-1]
    engine.core.apply_write_result(row.job.id, 1, WriteResult.CANCELLED)
    engine.core.step()
    assert engine.core.progress_at > seen[-1]


def test_a_submitted_row_makes_the_engine_busy_before_it_steps(engine: SteppedEngine) -> None:
    assert engine.core.idle
    engine.submit("row")
    assert (engine.core.idle, engine.core.busy) == (False, False)


# Start, trace, capacity


def test_a_row_starts_once_when_it_is_admitted_and_before_its_tokens(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}", max_tokens=3) for i in range(6)]
    engine.core.step()
    assert [output.sequence for output in engine.published if output.started] == rows[:4]
    engine.run()
    for row in rows:
        outputs = [output for output in engine.published if output.sequence is row]
        assert [output.started for output in outputs] == [True, *[False] * (len(outputs) - 1)]


def test_a_row_that_is_cancelled_while_it_waits_has_not_started(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}") for i in range(5)]
    engine.core.step()
    engine.core.apply_write_result(rows[4].job.id, 1, WriteResult.CANCELLED)
    engine.core.step()
    assert [output.started for output in engine.published if output.sequence is rows[4]] == [False]


def test_the_batch_is_traced_before_the_step_when_it_changes(engine: SteppedEngine) -> None:
    first = engine.submit("first", max_tokens=5)
    step, seen = engine.runner.execute, []
    engine.runner.execute = lambda plan: (seen.append(engine.traced[-1]), step(plan))[1]  # type: ignore[method-assign]
    for _ in range(3):
        engine.core.step()
    second = engine.submit("second", max_tokens=1)
    engine.run()
    one, both = [first.job.id], [first.job.id, second.job.id]
    assert seen == [one, one, one, both, one]
    assert engine.traced == [one, both, one, []]


def test_capacity_counts_submitted_rows_before_the_engine_receives_them() -> None:
    engine = SteppedEngine(slots=3, memory=1000)
    assert engine.core.capacity() == Capacity(3, 1000)
    engine.submit("x" * 100, max_tokens=50)
    assert engine.core.capacity() == Capacity(2, 850)
    engine.core.step()
    assert engine.core.capacity() == Capacity(2, 850)
    engine.submit("y" * 100, max_tokens=2000)
    assert engine.core.capacity() == Capacity(1, 0)
    engine.core.drain(60)
    engine.core.step()
    assert engine.core.capacity() == Capacity(0, 0)


def test_waiting_lists_the_jobs_that_are_not_admitted(engine: SteppedEngine) -> None:
    rows = [engine.submit(f"row {i}") for i in range(6)]
    assert engine.core.waiting() == [row.job.id for row in rows]
    engine.core.step()
    late = engine.submit("late")
    assert engine.core.waiting() == [rows[4].job.id, rows[5].job.id, late.job.id]
    engine.run()
    assert engine.core.waiting() == []


def test_there_is_no_capacity_before_the_model_is_loaded() -> None:
    assert EngineCore(FakeRunner, 4, list).capacity() == Capacity(0, 0)


def test_jobs_are_admitted_by_rank_and_resumed_ones_first(engine: SteppedEngine) -> None:
    ranks = {"late": 3.0, "early": 1.0, "between": 2.0}
    rows = {name: engine.submit(name, rank=rank) for name, rank in ranks.items()}
    rows["resumed"] = engine.submit("resumed", rank=9.0, attempt=2)
    engine.core.step()
    assert [output.sequence.request.prompt for output in engine.published if output.started] == [
        "resumed",
        "early",
        "between",
        "late",
    ]


# Outputs


def test_log_probabilities_are_published_for_rows_that_request_them(engine: SteppedEngine) -> None:
    with_logprobs, plain = engine.submit("row", logprobs=2), engine.submit("plain")
    engine.run()
    outputs = {
        row: [each for output in engine.published if output.sequence is row for each in output.outputs]
        for row in (with_logprobs, plain)
    }
    assert [each.token for each in outputs[with_logprobs]] == with_logprobs.generated
    assert all(each.logprob is not None and len(each.top_logprobs) == 2 for each in outputs[with_logprobs])
    assert all(each.logprob is None and not each.top_logprobs for each in outputs[plain])
    assert "".join(each.text for each in outputs[with_logprobs]) == engine.text(with_logprobs)
    assert [each.finish_reason for each in outputs[with_logprobs]] == [None] * 7 + ["length"]
    described = [with_logprobs.describe_logprob(each) for each in outputs[with_logprobs]]
    assert "".join(each["token"] for each in described) == engine.text(with_logprobs)
    assert all(each["top"][0] == {"token": each["token"], "logprob": each["logprob"]} for each in described)
    assert not plain.token_texts
