"""The engine of one model, step by step, on the fake runner."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from shared.errors import JobFailure
from shared.jobs.record import Ending, Status
from shared.queue.claims import WriteResult
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.engine.core import EngineCore
from worker.engine.scheduler import OVERTAKEN_S, Capacity, EngineBroken
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.runner.base import OutOfMemory, StepOutput, StepPlan
from worker.runner.fake import FakeRunner


class Bench:
    """An engine that a test steps by hand, and what it published."""

    def __init__(self, slots: int = 4, **runner: Any) -> None:
        self.runner = FakeRunner(**runner)
        self.published: list[SequenceOutput] = []
        self.traced: list[list[str]] = []
        self.core = EngineCore(lambda: self.runner, slots, self.published.extend, trace=self.traced.append)
        self.core.load()

    def submit(self, prompt: str, **request: Any) -> Sequence:
        sequence = sequence_for(claimed(prompt, **request), self.runner)
        self.core.submit(sequence)
        return sequence

    def run(self) -> None:
        self.core.step()
        while self.core.busy:
            self.core.step()

    def ending(self, sequence: Sequence) -> Ending:
        assert sequence.ending is not None
        outputs = [output for output in self.published if output.sequence is sequence]
        assert [output.started for output in outputs] == [bool(outputs[0].started), *[False] * (len(outputs) - 1)]
        return sequence.ending

    def text(self, sequence: Sequence) -> str:
        return text_of([output for output in self.published if output.sequence is sequence])


class Several(FakeRunner):
    """Gives each row the tokens of three steps at once, also behind its end, as speculative decoding may."""

    def execute(self, plan: StepPlan) -> StepOutput:
        first = super().execute(plan)
        others = [super(Several, self).execute(StepPlan()) for _ in range(2)]
        return replace(first, tokens=[token for each in (first, *others) for token in each.tokens])


@pytest.fixture
def bench() -> Bench:
    return Bench()


def alone(prompt: str, **request: Any) -> str:
    runner = FakeRunner()
    return text_of(run_alone(sequence_for(claimed(prompt, **request), runner), runner))


def test_rows_join_and_leave_while_others_run(bench: Bench) -> None:
    first = bench.submit("first", max_tokens=6)
    bench.core.step()
    second = bench.submit("second", max_tokens=2)
    bench.core.step()
    assert bench.core.slots_used == 2
    bench.core.step()
    assert (bench.core.slots_used, second.ending is None) == (1, False)
    bench.run()
    assert bench.text(first) == alone("first", max_tokens=6)
    assert bench.text(second) == alone("second", max_tokens=2)
    assert bench.core.totals.tokens == 8


@pytest.mark.parametrize("prompt", ["!words=7 end", "limit"])
@pytest.mark.parametrize("stop", [(), ("e",)], ids=str)
def test_a_row_may_get_several_tokens_a_step_and_nothing_behind_its_end(prompt: str, stop: tuple[str, ...]) -> None:
    bench = Bench()
    bench.runner = Several()
    bench.core = EngineCore(lambda: bench.runner, 4, bench.published.extend)
    bench.core.load()
    rows = [bench.submit(f"{prompt} {i}", max_tokens=10 + i, stop=stop) for i in range(3)]
    bench.run()
    for i, row in enumerate(rows):
        assert bench.text(row) == alone(f"{prompt} {i}", max_tokens=10 + i, stop=stop)
        assert [output.outcome for output in bench.published if output.sequence is row].count(Outcome.ENDED) == 1
    totals = bench.core.totals
    assert totals.tokens == sum(bench.ending(row).completion_tokens for row in rows)
    assert totals.last_batch <= 3


def test_what_finds_no_slot_waits_in_order(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=3) for i in range(9)]
    bench.core.step()
    assert bench.core.slots_used == 4
    bench.run()
    ends = [output.sequence for output in bench.published if output.ending]
    assert ends == rows


@pytest.mark.parametrize(
    ("write_result", "status"), [(WriteResult.CANCELLED, Status.CANCELLED), (WriteResult.EXPIRED, Status.EXPIRED)]
)
def test_a_stop_word_frees_the_slot_at_the_next_step(bench: Bench, write_result: WriteResult, status: Status) -> None:
    stopped, *others = [bench.submit(f"row {i}", max_tokens=9) for i in range(4)]
    bench.core.step()
    late = bench.submit("late", max_tokens=2)
    bench.core.apply_write_result(stopped.job.id, 1, write_result)
    bench.core.step()
    assert stopped.uid not in {token.uid for token in bench.runner.execute(StepPlan()).tokens}
    assert bench.ending(stopped).status is status
    assert len(late.generated) == 1
    bench.run()
    assert all(bench.ending(row).status is Status.SUCCEEDED for row in (*others, late))


def test_the_end_is_published_only_once_the_slot_is_free(bench: Bench) -> None:
    used: list[int] = []
    batch = EngineCore(lambda: bench.runner, 4, lambda published: used.append(batch.slots_used))
    batch.load()
    batch.submit(sequence_for(claimed(max_tokens=1), bench.runner))
    batch.step()
    assert used == [1, 0], "the start, then the end"


def test_a_word_for_a_waiting_row_ends_it_without_a_step(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}") for i in range(5)]
    bench.core.step()
    bench.core.apply_write_result(rows[4].job.id, 1, WriteResult.CANCELLED)
    bench.core.step()
    assert bench.ending(rows[4]).completion_tokens == 0


def test_a_word_for_another_attempt_or_a_stranger_does_nothing(bench: Bench) -> None:
    row = bench.submit("row")
    bench.core.step()
    bench.core.apply_write_result(row.job.id, 7, WriteResult.CANCELLED)
    bench.core.apply_write_result("job_other", 1, WriteResult.FENCED)
    bench.run()
    assert bench.ending(row).status is Status.SUCCEEDED


def test_a_fenced_row_is_dropped_without_a_word(bench: Bench) -> None:
    row = bench.submit("row")
    bench.core.step()
    bench.core.apply_write_result(row.job.id, 1, WriteResult.FENCED)
    before = len(bench.published)
    bench.core.step()
    assert (row.outcome, bench.core.slots_used, len(bench.published)) == (Outcome.FENCED, 0, before)


def test_a_row_that_the_runner_fails_ends_alone(bench: Bench) -> None:
    bad, good = bench.submit("!row-fails=3"), bench.submit("good")
    bench.run()
    ending = bench.ending(bad)
    assert (ending.status, ending.error_code, ending.completion_tokens) == (Status.FAILED, JobFailure.ROW, 2)
    assert bench.text(good) == alone("good")


def test_a_row_whose_text_raises_ends_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = bench.submit("bad"), bench.submit("good")
    monkeypatch.setattr(bad.detokenizer, "add", lambda token: 1 / 0)
    bench.run()
    assert bench.ending(bad).error_code == JobFailure.ROW
    assert bench.text(good) == alone("good")


def test_a_lost_batch_fails_the_row_to_blame_and_no_other(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=9) for i in range(3)]
    bad = bench.submit("!step-fails=4", max_tokens=9)
    bench.run()
    assert bench.ending(bad).error_code == JobFailure.ENGINE
    assert [bench.text(row) for row in rows] == [alone(f"row {i}", max_tokens=9) for i in range(3)]


def test_an_error_that_hits_no_row_alone_fails_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, something that the fourth row makes too long."""
    step = bench.runner.execute

    def narrow(plan: StepPlan) -> object:
        if len(bench.runner._rows) > 3:
            raise RuntimeError
        return step(plan)

    monkeypatch.setattr(bench.runner, "execute", narrow)
    rows = [bench.submit(f"row {i}", max_tokens=4) for i in range(4)]
    bench.run()
    assert [bench.text(row) for row in rows] == [alone(f"row {i}", max_tokens=4) for i in range(4)]


def test_a_job_that_memory_never_suffices_for_fails_at_once_and_alone() -> None:
    bench = Bench(memory=60)
    before = bench.submit("before", max_tokens=8)
    never = [bench.submit("x" * 20, max_tokens=41) for _ in range(5)]
    after = bench.submit("after", max_tokens=8)
    bench.core.step()
    for row in never:
        ending = bench.ending(row)
        assert (ending.status, ending.error_code) == (Status.FAILED, JobFailure.MEMORY)
    bench.run()
    assert [bench.text(row) for row in (before, after)] == [alone(p, max_tokens=8) for p in ("before", "after")]


def test_want_of_memory_of_one_row_after_another_is_no_broken_engine(bench: Bench) -> None:
    for i in range(5):
        row = bench.submit(f"!no-memory=1 {i}")
        bench.run()
        assert bench.ending(row).error_code == JobFailure.MEMORY
    good = bench.submit("good")
    bench.run()
    assert bench.text(good) == alone("good")


def test_a_batch_that_is_too_large_goes_on_in_halves_and_grows_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(slots=8)
    step, sizes = bench.runner.execute, []

    def narrow(plan: StepPlan) -> object:
        sizes.append(len(bench.runner._rows))
        if len(sizes) == 3:
            raise OutOfMemory
        return step(plan)

    monkeypatch.setattr(bench.runner, "execute", narrow)
    rows = [bench.submit(f"row {i}", max_tokens=5) for i in range(20)]
    bench.run()
    assert [bench.text(row) for row in rows] == [alone(f"row {i}", max_tokens=5) for i in range(20)]
    assert sizes[2] == 8
    assert sizes[3] == 4
    assert max(sizes[4:]) == 8


def test_a_runner_that_always_raises_ends_the_engine_not_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.runner, "execute", lambda plan: 1 / 0)
    rows = [bench.submit(f"row {i}") for i in range(4)]
    with pytest.raises(EngineBroken):
        bench.run()
    assert sum(row.ending is None for row in rows) == 2


def test_a_drain_hands_back_what_waits_and_finishes_what_can(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=3) for i in range(6)]
    bench.core.step()
    bench.core.drain(60)
    late = bench.submit("late")
    bench.run()
    assert [row.ending is not None for row in rows] == [True] * 4 + [False] * 2
    back = [output.sequence for output in bench.published if output.outcome is Outcome.HANDED_BACK]
    assert back == [*rows[4:], late]


def test_a_drain_hands_back_what_takes_too_long(bench: Bench) -> None:
    row = bench.submit("row", max_tokens=1000)
    bench.core.step()
    bench.core.drain(0)
    bench.core.step()
    assert not bench.core.busy
    assert bench.published[-1].outcome is Outcome.HANDED_BACK
    assert row.ending is None


def test_gauges_are_not_read_at_every_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []
    monkeypatch.setattr(bench.runner, "stats", lambda: readings.append(1) or {})
    bench.submit("row", max_tokens=50)
    bench.run()
    assert len(readings) < bench.core.totals.steps / 2


def test_a_step_that_gives_nothing_is_no_progress(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("worker.engine.core.time.monotonic", lambda: float(next(clock)))
    row = bench.submit("!stall=3", max_tokens=9)
    seen = []
    for _ in range(8):
        bench.core.step()
        seen.append(bench.core.progress_at)
    assert [before < after for before, after in itertools.pairwise(seen)] == [True] + [False] * 6
    bench.core.apply_write_result("job_other", 1, WriteResult.CANCELLED)
    bench.core.step()
    assert bench.core.progress_at == seen[-1]
    bench.core.apply_write_result(row.job.id, 1, WriteResult.CANCELLED)
    bench.core.step()
    assert bench.core.progress_at > seen[-1]


def test_what_is_asked_of_a_stuck_engine_counts_as_under_way(bench: Bench) -> None:
    assert bench.core.idle
    bench.submit("row")
    assert (bench.core.idle, bench.core.busy) == (False, False)


# Start, trace, capacity


def test_a_row_starts_once_when_it_is_admitted_and_before_its_tokens(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=3) for i in range(6)]
    bench.core.step()
    assert [output.sequence for output in bench.published if output.started] == rows[:4]
    bench.run()
    for row in rows:
        outputs = [output for output in bench.published if output.sequence is row]
        assert [output.started for output in outputs] == [True, *[False] * (len(outputs) - 1)]


def test_a_row_that_is_cancelled_while_it_waits_has_not_started(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}") for i in range(5)]
    bench.core.step()
    bench.core.apply_write_result(rows[4].job.id, 1, WriteResult.CANCELLED)
    bench.core.step()
    assert [output.started for output in bench.published if output.sequence is rows[4]] == [False]


def test_the_jobs_in_the_batch_are_traced_before_the_step_and_only_when_they_change(bench: Bench) -> None:
    first = bench.submit("first", max_tokens=5)
    step, seen = bench.runner.execute, []
    bench.runner.execute = lambda plan: (seen.append(bench.traced[-1]), step(plan))[1]  # type: ignore[method-assign]
    for _ in range(3):
        bench.core.step()
    second = bench.submit("second", max_tokens=1)
    bench.run()
    one, both = [first.job.id], [first.job.id, second.job.id]
    assert seen == [one, one, one, both, one]
    assert bench.traced == [one, both, one, []]


def test_capacity_is_what_rows_and_memory_leave_also_before_the_engine_has_seen_them() -> None:
    bench = Bench(slots=3, memory=1000)
    assert bench.core.capacity() == Capacity(3, 1000)
    bench.submit("x" * 100, max_tokens=50)
    assert bench.core.capacity() == Capacity(2, 850)
    bench.core.step()
    assert bench.core.capacity() == Capacity(2, 850)
    bench.submit("y" * 100, max_tokens=2000)
    assert bench.core.capacity() == Capacity(1, 0)
    bench.core.drain(60)
    bench.core.step()
    assert bench.core.capacity() == Capacity(0, 0)


def test_waiting_are_those_submitted_and_not_admitted(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}") for i in range(6)]
    assert bench.core.waiting() == [row.job.id for row in rows]
    bench.core.step()
    late = bench.submit("late")
    assert bench.core.waiting() == [rows[4].job.id, rows[5].job.id, late.job.id]
    bench.run()
    assert bench.core.waiting() == []


def test_before_it_is_loaded_it_has_no_capacity() -> None:
    assert EngineCore(FakeRunner, 4, list).capacity() == Capacity(0, 0)


def test_jobs_are_admitted_by_rank_and_resumed_ones_first(bench: Bench) -> None:
    ranks = {"late": 3.0, "early": 1.0, "between": 2.0}
    rows = {name: bench.submit(name, rank=rank) for name, rank in ranks.items()}
    rows["resumed"] = bench.submit("resumed", rank=9.0, attempt=2)
    bench.core.step()
    assert [output.sequence.request.prompt for output in bench.published if output.started] == [
        "resumed",
        "early",
        "between",
        "late",
    ]


# Memory


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the scheduler takes for the time."""
    moment = [1000.0]
    monkeypatch.setattr("worker.engine.scheduler.time.monotonic", lambda: moment[0])
    return moment


def test_rows_are_admitted_by_the_length_that_they_are_expected_to_reach() -> None:
    bench = Bench(slots=8, memory=4000)
    for i in range(8):
        bench.submit(f"!words=9 {i}", max_tokens=3000)
    bench.core.step()
    assert bench.core.slots_used == 8


def test_a_row_that_does_not_fit_is_overtaken_for_a_while_and_then_space_is_reserved(now: list[float]) -> None:
    bench = Bench(slots=8, memory=400)
    running = bench.submit("r" * 100, max_tokens=50)
    bench.core.step()
    large = bench.submit("l" * 300, max_tokens=8, rank=1)
    small = [bench.submit(f"{i}", max_tokens=3, rank=2) for i in range(2)]
    bench.core.step()
    assert all(row.started for row in small) and not large.started
    now[0] += OVERTAKEN_S - 0.1
    overtaking = bench.submit("3", max_tokens=3, rank=2)
    bench.core.step()
    assert overtaking.started
    now[0] += 0.2
    held_up = bench.submit("4", max_tokens=3, rank=2)
    while running.ending is None:
        bench.core.step()
        assert not held_up.started
    bench.run()
    starts = [output.sequence for output in bench.published if output.started]
    assert starts[-2:] == [large, held_up]


def test_when_memory_runs_short_the_newest_row_is_preempted_and_continues_as_if_it_had_not_been() -> None:
    bench = Bench(slots=8, memory=1500)
    rows = [bench.submit(f"row {i}", max_tokens=900) for i in range(3)]
    bench.run()
    for i, row in enumerate(rows):
        ending = bench.ending(row)
        assert (bench.text(row), ending.completion_tokens) == (alone(f"row {i}", max_tokens=900), 900)
    assert bench.core._scheduler.preemptions > 0
    assert [output.sequence for output in bench.published if output.ending] == rows
    assert [output.sequence for output in bench.published if output.started] == rows


def test_no_more_memory_is_used_than_there_is() -> None:
    bench = Bench(slots=8, memory=2000)
    for i in range(8):
        bench.submit(f"row {i}", max_tokens=400 + 37 * i)
    bench.core.step()
    while bench.core.busy:
        used = sum(len(row.row.prompt) + row.position - row.row.generated for row in bench.runner._rows.values())
        assert used <= 2000
        bench.core.step()


def test_after_answers_have_ended_new_ones_are_expected_to_be_as_long() -> None:
    bench = Bench(slots=8, memory=3000)
    for i in range(40):
        bench.submit(f"!words=900 {i}", max_tokens=2000)
    bench.run()
    preempted = bench.core._scheduler.preemptions
    assert preempted > 0
    rows = [bench.submit(f"!words=900 more {i}", max_tokens=2000) for i in range(8)]
    bench.core.step()
    assert sum(row.started for row in rows) == 3


def test_prefixes_have_what_rows_are_expected_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(FakeRunner, "set_prefix_limit", lambda _, most: limits.append(most))
    bench = Bench(memory=1000)
    bench.submit("x" * 100, max_tokens=50)
    bench.core.step()
    assert (limits[0], limits[-1]) == (1000, 850)
    bench.run()
    assert limits[-1] == 1000
    bench.core.grant(300)
    assert limits[-1] == 300


def test_rows_keep_memory_that_is_only_lent_to_another_model() -> None:
    bench = Bench(memory=1000)
    row = bench.submit("x" * 100, max_tokens=500)
    bench.core.step()
    bench.core.grant(10, 1000)
    waits = bench.submit("y", max_tokens=20)
    for _ in range(50):
        bench.core.step()
    assert len(row.generated) > 40 and not waits.started
    bench.core.grant(1000)
    bench.run()
    assert waits.ending and waits.ending.status is Status.SUCCEEDED


class Narrow(FakeRunner):
    """Has memory to prefill two rows at a time, or none for a prompt that says so."""

    def execute(self, plan: StepPlan) -> StepOutput:
        uids = plan.prefill.uids if plan.prefill else ()
        never = [uid for uid in uids if b"never" in bytes(self._rows[uid].row.prompt)]
        if len(uids) > 2 or never:
            self.remove(uids)
            return StepOutput(out_of_memory=uids)
        return super().execute(plan)


def test_rows_whose_prefill_finds_no_memory_are_tried_once_more_alone() -> None:
    bench = Bench()
    bench.runner = Narrow()
    bench.core = EngineCore(lambda: bench.runner, 4, bench.published.extend)
    bench.core.load()
    prompts = ["one", "two", "never", "three"]
    rows = [bench.submit(prompt) for prompt in prompts]
    bench.run()
    assert bench.ending(rows[2]).error_code == JobFailure.MEMORY
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt == "never" or bench.text(row) == alone(prompt)


def test_a_row_that_is_cancelled_before_it_is_tried_again_is_not_inserted() -> None:
    bench = Bench()
    bench.runner = Narrow()
    bench.core = EngineCore(lambda: bench.runner, 4, bench.published.extend)
    bench.core.load()
    row = bench.submit("never")
    bench.core.step()
    bench.core.apply_write_result(row.job.id, 1, WriteResult.CANCELLED)
    bench.core.step()
    assert not bench.runner._rows
    assert bench.ending(row).status is Status.CANCELLED


# Outputs


def test_log_probabilities_are_published_with_the_tokens_of_rows_that_ask(bench: Bench) -> None:
    asked, plain = bench.submit("asked", logprobs=2), bench.submit("plain")
    bench.run()
    outputs = {
        row: [each for output in bench.published if output.sequence is row for each in output.outputs]
        for row in (asked, plain)
    }
    assert [each.token for each in outputs[asked]] == asked.generated
    assert all(each.logprob is not None and len(each.top_logprobs) == 2 for each in outputs[asked])
    assert all(each.logprob is None and not each.top_logprobs for each in outputs[plain])
    assert "".join(each.text for each in outputs[asked]) == bench.text(asked)
    assert [each.finish_reason for each in outputs[asked]] == [None] * 7 + ["length"]
    described = [asked.describe_logprob(each) for each in outputs[asked]]
    assert "".join(each["token"] for each in described) == bench.text(asked)
    assert all(each["top"][0] == {"token": each["token"], "logprob": each["logprob"]} for each in described)
    assert not plain.token_texts
