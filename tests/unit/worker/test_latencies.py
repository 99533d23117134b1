"""The latencies that an engine observes: once per job or token, and none for what it cannot know."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.histogram import Histogram
from shared.jobs.record import Priority
from shared.queue.claims import WriteResult
from tests.plugins.work import claimed, sequence_for
from tests.support.stepped_engine import SteppedEngine


@pytest.fixture
def engine() -> SteppedEngine:
    return SteppedEngine()


def counts(engine: SteppedEngine) -> dict[tuple[str, str], int]:
    """Return the number of observations by name and class."""
    return {(each.name, each.priority): sum(each.counts) for each in engine.core.totals.latencies.read()}


def test_each_job_and_each_token_is_observed_once(engine: SteppedEngine) -> None:
    for number in range(3):
        engine.submit(f"row {number}", max_tokens=5)
    engine.run()
    assert counts(engine) == {
        ("queue_wait", "normal"): 3,
        ("time_to_first_token", "normal"): 3,
        ("inter_token_latency", ""): 3 * 4,
        ("prefill", ""): 3,
        ("time_per_output_token", "normal"): 3,
        ("request_duration", "normal"): 3,
    }
    assert engine.core.totals.rows == engine.core.totals.tokens == 15


def test_rows_that_join_later_are_observed_like_others(engine: SteppedEngine) -> None:
    engine.submit("first", max_tokens=6)
    for _ in range(3):
        engine.core.step()
    engine.submit("second", max_tokens=2)
    engine.run()
    found = counts(engine)
    assert (found["time_to_first_token", "normal"], found["inter_token_latency", ""]) == (2, 5 + 1)


def test_classes_are_told_apart(engine: SteppedEngine) -> None:
    job = claimed("urgent", max_tokens=2)
    urgent = replace(job, job=replace(job.job, priority=Priority.HIGH))
    engine.core.submit(sequence_for(urgent, engine.runner))
    engine.submit("other", max_tokens=2)
    engine.run()
    found = counts(engine)
    assert found["time_to_first_token", "high"] == found["time_to_first_token", "normal"] == 1


def test_the_wait_and_the_first_token_of_an_earlier_attempt_are_not_observed_again(engine: SteppedEngine) -> None:
    job = claimed("continued", max_tokens=3)
    resumed = replace(job, job=replace(job.job, attempt=2, started_at=job.job.created_at + 1))
    sequence = sequence_for(resumed, engine.runner)
    sequence.timings.forget_first_token()
    engine.core.submit(sequence)
    engine.run()
    found = counts(engine)
    assert not {"queue_wait", "time_to_first_token", "time_per_output_token"} & {name for name, _ in found}
    assert found["request_duration", "normal"] == 1 and found["inter_token_latency", ""] == 2


def test_jobs_that_do_not_succeed_have_no_duration(engine: SteppedEngine) -> None:
    row = engine.submit("cancelled", max_tokens=50)
    for _ in range(3):
        engine.core.step()
    engine.core.apply_write_result(row.job.id, row.job.attempt, WriteResult.CANCELLED)
    engine.run()
    assert ("request_duration", "normal") not in counts(engine)
    assert counts(engine)["time_to_first_token", "normal"] == 1


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram("prefill", (0.1, 1.0))
    for seconds in (0.1, 0.11, 1.0, 5.0):
        histogram.observe(seconds)
    assert (histogram.counts, histogram.sum) == ([1, 2, 1], pytest.approx(6.21))
