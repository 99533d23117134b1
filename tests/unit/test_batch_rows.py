"""The engine's loop, step by step, on the fake backend."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import pytest

from shared.errors import JobFailure
from shared.jobs.record import Ending, Status
from shared.queue.claims import Verdict
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.engine.core import Batch, EngineBroken
from worker.engine.crowding import Crowding
from worker.engine.sequence import Outcome, Said, Sequence
from worker.runner.base import OutOfMemory, StepResult
from worker.runner.fake import FakeBackend


class Bench:
    """An engine that a test steps by hand, and what it said."""

    def __init__(self, slots: int = 4, crowding: Crowding | None = None, **backend: Any) -> None:
        self.backend = FakeBackend(**backend)
        self.said: list[Said] = []
        self.batch = Batch(lambda: self.backend, slots, self.said.extend, crowding=crowding)
        self.batch.load()

    def submit(self, prompt: str, **generation: Any) -> Sequence:
        sequence = sequence_for(claimed(prompt, **generation), self.backend)
        self.batch.submit(sequence)
        return sequence

    def run(self) -> None:
        self.batch.step()
        while self.batch.busy:
            self.batch.step()

    def ending(self, sequence: Sequence) -> Ending:
        assert sequence.ending is not None
        assert text_of([word for word in self.said if word.sequence is sequence]) == sequence.ending.text
        return sequence.ending


class Several(FakeBackend):
    """Gives each row the tokens of three steps at once, also behind its end, as one that guesses may."""

    def step(self) -> StepResult:
        first, *others = (super(Several, self).step() for _ in range(3))
        return replace(first, tokens=[pair for each in (first, *others) for pair in each.tokens])


@pytest.fixture
def bench() -> Bench:
    return Bench()


def alone(prompt: str, **generation: Any) -> str:
    backend = FakeBackend()
    return text_of(run_alone(sequence_for(claimed(prompt, **generation), backend), backend))


def test_rows_join_and_leave_while_others_run(bench: Bench) -> None:
    first = bench.submit("first", max_tokens=6)
    bench.batch.step()
    second = bench.submit("second", max_tokens=2)
    bench.batch.step()
    assert bench.batch.slots_used == 2
    bench.batch.step()
    assert (bench.batch.slots_used, second.ending is None) == (1, False)
    bench.run()
    assert bench.ending(first).text == alone("first", max_tokens=6)
    assert bench.ending(second).text == alone("second", max_tokens=2)
    assert bench.batch.totals.tokens == 8


@pytest.mark.parametrize("prompt", ["!words=7 end", "limit"])
@pytest.mark.parametrize("stop", [(), ("e",)], ids=str)
def test_a_row_may_get_several_tokens_a_step_and_nothing_behind_its_end(prompt: str, stop: tuple[str, ...]) -> None:
    bench = Bench()
    bench.backend = Several()
    bench.batch = Batch(lambda: bench.backend, 4, bench.said.extend)
    bench.batch.load()
    rows = [bench.submit(f"{prompt} {i}", max_tokens=10 + i, stop=stop) for i in range(3)]
    bench.run()
    for i, row in enumerate(rows):
        assert bench.ending(row).text == alone(f"{prompt} {i}", max_tokens=10 + i, stop=stop)
        assert [word.outcome for word in bench.said if word.sequence is row].count(Outcome.ENDED) == 1
    totals = bench.batch.totals
    assert totals.tokens == sum(bench.ending(row).completion_tokens for row in rows)
    assert totals.last_batch <= 3


def test_what_finds_no_slot_waits_in_order(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=3) for i in range(9)]
    bench.batch.step()
    assert bench.batch.slots_used == 4
    bench.run()
    ends = [word.sequence for word in bench.said if word.ending]
    assert ends == rows


@pytest.mark.parametrize(
    ("verdict", "status"), [(Verdict.CANCELLED, Status.CANCELLED), (Verdict.EXPIRED, Status.EXPIRED)]
)
def test_a_stop_word_frees_the_slot_at_the_next_step(bench: Bench, verdict: Verdict, status: Status) -> None:
    stopped, *others = [bench.submit(f"row {i}", max_tokens=9) for i in range(4)]
    bench.batch.step()
    late = bench.submit("late", max_tokens=2)
    bench.batch.heed(stopped.job.id, 1, verdict)
    bench.batch.step()
    assert stopped.uid not in dict(bench.backend.step().tokens)
    assert bench.ending(stopped).status is status
    assert len(late.generated) == 1
    bench.run()
    assert all(bench.ending(row).status is Status.SUCCEEDED for row in (*others, late))


def test_the_end_is_told_only_once_the_slot_is_free(bench: Bench) -> None:
    used: list[int] = []
    batch = Batch(lambda: bench.backend, 4, lambda said: used.append(batch.slots_used))
    batch.load()
    batch.submit(sequence_for(claimed(max_tokens=1), bench.backend))
    batch.step()
    assert used == [0]


def test_a_word_for_a_waiting_row_ends_it_without_a_step(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}") for i in range(5)]
    bench.batch.step()
    bench.batch.heed(rows[4].job.id, 1, Verdict.CANCELLED)
    bench.batch.step()
    assert bench.ending(rows[4]).completion_tokens == 0


def test_a_word_for_another_attempt_or_a_stranger_does_nothing(bench: Bench) -> None:
    row = bench.submit("row")
    bench.batch.step()
    bench.batch.heed(row.job.id, 7, Verdict.CANCELLED)
    bench.batch.heed("job_other", 1, Verdict.FENCED)
    bench.run()
    assert bench.ending(row).status is Status.SUCCEEDED


def test_a_fenced_row_is_dropped_without_a_word(bench: Bench) -> None:
    row = bench.submit("row")
    bench.batch.step()
    bench.batch.heed(row.job.id, 1, Verdict.FENCED)
    before = len(bench.said)
    bench.batch.step()
    assert (row.outcome, bench.batch.slots_used, len(bench.said)) == (Outcome.FENCED, 0, before)


def test_a_row_that_the_backend_fails_ends_alone(bench: Bench) -> None:
    bad, good = bench.submit("!row-fails=3"), bench.submit("good")
    bench.run()
    ending = bench.ending(bad)
    assert (ending.status, ending.error_code, ending.completion_tokens) == (Status.FAILED, JobFailure.ROW, 2)
    assert bench.ending(good).text == alone("good")


def test_a_row_whose_text_raises_ends_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = bench.submit("bad"), bench.submit("good")
    monkeypatch.setattr(bad, "push", lambda token: 1 / 0)
    bench.run()
    assert bench.ending(bad).error_code == JobFailure.ROW
    assert bench.ending(good).text == alone("good")


def test_a_lost_batch_fails_the_row_to_blame_and_no_other(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=9) for i in range(3)]
    bad = bench.submit("!step-fails=4", max_tokens=9)
    bench.run()
    assert bench.ending(bad).error_code == JobFailure.ENGINE
    assert [bench.ending(row).text for row in rows] == [alone(f"row {i}", max_tokens=9) for i in range(3)]


def test_an_error_that_hits_no_row_alone_fails_none(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, something that the fourth row makes too long."""
    step = bench.backend.step

    def narrow() -> object:
        if len(bench.backend._rows) > 3:
            raise RuntimeError
        return step()

    monkeypatch.setattr(bench.backend, "step", narrow)
    rows = [bench.submit(f"row {i}", max_tokens=4) for i in range(4)]
    bench.run()
    assert [bench.ending(row).text for row in rows] == [alone(f"row {i}", max_tokens=4) for i in range(4)]


def test_jobs_wait_for_memory_in_the_order_in_which_they_came() -> None:
    bench = Bench(memory=60)
    large = [bench.submit("x" * 20, max_tokens=8) for _ in range(2)]
    larger = bench.submit("y" * 40, max_tokens=8)
    small = bench.submit("z", max_tokens=8)
    bench.batch.step()
    assert bench.batch.slots_used == 2
    for _ in range(7):
        bench.batch.step()
        assert not small.generated
    bench.run()
    assert [word.sequence for word in bench.said if word.ending] == [*large, larger, small]
    assert all(bench.ending(row).status is Status.SUCCEEDED for row in (*large, larger, small))


def test_a_job_that_memory_never_suffices_for_fails_at_once_and_alone() -> None:
    bench = Bench(memory=60)
    before = bench.submit("before", max_tokens=8)
    never = [bench.submit("x" * 20, max_tokens=41) for _ in range(5)]
    after = bench.submit("after", max_tokens=8)
    bench.batch.step()
    for row in never:
        ending = bench.ending(row)
        assert (ending.status, ending.error_code) == (Status.FAILED, JobFailure.MEMORY)
    bench.run()
    assert [bench.ending(row).text for row in (before, after)] == [alone(p, max_tokens=8) for p in ("before", "after")]


def test_want_of_memory_of_one_row_after_another_is_no_broken_engine(bench: Bench) -> None:
    for i in range(5):
        row = bench.submit(f"!no-memory=1 {i}")
        bench.run()
        assert bench.ending(row).error_code == JobFailure.MEMORY
    good = bench.submit("good")
    bench.run()
    assert bench.ending(good).text == alone("good")


def test_a_batch_that_is_too_large_goes_on_in_halves_and_grows_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(slots=8)
    step, sizes = bench.backend.step, []

    def narrow() -> object:
        sizes.append(len(bench.backend._rows))
        if len(sizes) == 3:
            raise OutOfMemory
        return step()

    monkeypatch.setattr(bench.backend, "step", narrow)
    rows = [bench.submit(f"row {i}", max_tokens=5) for i in range(20)]
    bench.run()
    assert [bench.ending(row).text for row in rows] == [alone(f"row {i}", max_tokens=5) for i in range(20)]
    assert sizes[2] == 8
    assert sizes[3] == 4
    assert max(sizes[4:]) == 8


def test_a_backend_that_always_raises_ends_the_engine_not_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.backend, "step", lambda: 1 / 0)
    rows = [bench.submit(f"row {i}") for i in range(4)]
    with pytest.raises(EngineBroken):
        bench.run()
    assert sum(row.ending is None for row in rows) == 2


def test_a_drain_hands_back_what_waits_and_finishes_what_can(bench: Bench) -> None:
    rows = [bench.submit(f"row {i}", max_tokens=3) for i in range(6)]
    bench.batch.step()
    bench.batch.drain(60)
    late = bench.submit("late")
    bench.run()
    assert [row.ending is not None for row in rows] == [True] * 4 + [False] * 2
    back = [word.sequence for word in bench.said if word.outcome is Outcome.HANDED_BACK]
    assert back == [*rows[4:], late]


def test_a_drain_hands_back_what_takes_too_long(bench: Bench) -> None:
    row = bench.submit("row", max_tokens=1000)
    bench.batch.step()
    bench.batch.drain(0)
    bench.batch.step()
    assert not bench.batch.busy
    assert bench.said[-1].outcome is Outcome.HANDED_BACK
    assert row.ending is None


def test_gauges_are_not_read_at_every_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[int] = []
    monkeypatch.setattr(bench.backend, "stats", lambda: readings.append(1) or {})
    bench.submit("row", max_tokens=50)
    bench.run()
    assert len(readings) < bench.batch.totals.steps / 2


def test_a_step_that_gives_nothing_is_no_progress(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("worker.engine.core.time.monotonic", lambda: float(next(clock)))
    row = bench.submit("!stall=3", max_tokens=9)
    seen = []
    for _ in range(8):
        bench.batch.step()
        seen.append(bench.batch.progress_at)
    assert [before < after for before, after in itertools.pairwise(seen)] == [True] + [False] * 6
    bench.batch.heed("job_other", 1, Verdict.CANCELLED)
    bench.batch.step()
    assert bench.batch.progress_at == seen[-1]
    bench.batch.heed(row.job.id, 1, Verdict.CANCELLED)
    bench.batch.step()
    assert bench.batch.progress_at > seen[-1]


def test_what_is_asked_of_a_stuck_engine_counts_as_under_way(bench: Bench) -> None:
    assert bench.batch.idle
    bench.submit("row")
    assert (bench.batch.idle, bench.batch.busy) == (False, False)


class Crowded(Bench):
    """On a machine where twice as many rows than four take four times as long; its clock knows nothing else."""

    def __init__(self, slots: int = 16) -> None:
        self.now = 0.0
        super().__init__(slots, Crowding(slots, lambda: self.now))
        step = self.backend.step
        self.backend.step = lambda: self._later(step())  # type: ignore[method-assign]

    def _later(self, result: StepResult) -> StepResult:
        self.now += 0.005 * max(1.0, len(result.tokens) / 4) ** 2
        return result

    def crowd(self, rows: int) -> list[Sequence]:
        """Jobs with long prompts, and answers of different lengths."""
        return [self.submit(f"{i} {'long ' * 200}", max_tokens=20 + 7 * i % 40) for i in range(rows)]


def test_where_more_rows_are_slower_fewer_are_admitted_in_their_order() -> None:
    bench = Crowded()
    rows = bench.crowd(600)
    begun: list[Sequence] = []
    caps, sizes = set(), []
    while bench.batch.busy or not begun:
        bench.batch.step()
        begun += [row for row in bench.batch._rows.values() if row not in begun[-32:]]
        caps.add(bench.batch.row_cap)
        sizes.append(bench.batch.slots_used)
    assert 16 in caps and min(caps) <= 8
    assert statistics.median(sizes) < 16
    assert begun == rows
    assert all(row.ending and row.ending.status is Status.SUCCEEDED for row in rows)
    assert bench.batch.row_cap == 16  # nobody waits


def test_a_job_that_was_running_elsewhere_does_not_wait_for_the_cap() -> None:
    bench = Crowded()
    bench.crowd(600)
    while bench.batch.row_cap > 8 or bench.batch.slots_used > 8:
        bench.batch.step()
    bench.batch.step()
    assert bench.batch.slots_used <= 8
    resumed = sequence_for(claimed("resumed", attempt=2), bench.backend)
    bench.batch._waiting.insert(3, resumed)
    bench.batch.step()
    assert resumed in bench.batch._rows.values()
    assert bench.batch.slots_used > 8


def test_a_lost_batch_lifts_the_cap() -> None:
    bench = Crowded()
    bench.crowd(600)
    while bench.batch.row_cap > 8:
        bench.batch.step()
    bench.batch.submit(sequence_for(claimed("!step-fails=1", attempt=2), bench.backend))
    while bench.batch.row_cap <= 8:
        bench.batch.step()
    assert bench.batch._suspects
