"""The figures that the bench computes: arrivals, latencies, goodput, capacity, disturbance."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.plans import ChatRequest, Client, Plan
from tests.bench.samples import (
    LatencyTarget,
    Outcome,
    Sample,
    capacity,
    decode_speed,
    figures,
    goodput,
    quantile,
)
from tests.bench.scenarios.base import NotMeasured
from tests.bench.scenarios.mixed import LONG, QUIET, RUNNING, disturbance
from tests.bench.scenarios.open_loop import poisson


def sample(*chunks: float, due_s: float = 0.0, client: int = 0, kind: str = "", ended: bool = True) -> Sample:
    """One request with one token per chunk."""
    return Sample(client, kind, due_s, list(chunks), len(chunks), chunks[-1] if ended and chunks else None)


def test_poisson_arrivals_depend_on_the_seed_only() -> None:
    assert poisson(5, 60, seed=1) == poisson(5, 60, seed=1)
    assert poisson(5, 60, seed=1) != poisson(5, 60, seed=2)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = poisson(50, 400, seed=7)
    gaps = [after - before for before, after in pairwise(times)]

    assert times == sorted(times)
    assert times[-1] < 400
    assert len(times) == pytest.approx(50 * 400, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # as in an exponential distribution


def test_quantiles_are_measured_values() -> None:
    values = list(range(101))

    assert (quantile(values, 0), quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1)) == (0, 50, 99, 100)
    assert quantile(reversed(values), 0.99) == 99
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([], 0.99) == 0.0


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_splits_the_values(values: list[float], q: float) -> None:
    found = quantile(values, q)

    assert found in values
    assert sum(value < found for value in values) <= q * len(values) + 0.5
    assert sum(value > found for value in values) <= (1 - q) * len(values) + 0.5


def test_figures_of_two_requests() -> None:
    found = figures([sample(1.0, 1.5, 2.5), sample(2.0, 2.2, due_s=1.5)], wall_s=2.5)

    assert (found["requests"], found["failed"], found["tokens"]) == (2, 0, 5)
    assert found["tokens_per_s"] == 2.0
    assert (found["ttft_p50_s"], found["ttft_p99_s"]) == (0.5, 1.0)
    assert found["gap_p99_s"] == 1.0


def test_a_failed_request_is_counted_and_its_latency_is_not() -> None:
    broken = Sample(1, "", 0.0, [9.0], 0, None, error="gone")

    found = figures([sample(1.0, 2.0), broken], wall_s=10)

    assert (found["failed"], found["ttft_p99_s"], found["tokens"]) == (1, 1.0, 2)


def test_chunks_read_together_are_one_arrival() -> None:
    merged = sample(1.0, 1.0001, 1.0002, 1.1, 1.1001)

    assert merged.arrivals == [1.0, 1.1]
    assert merged.gaps == pytest.approx([0.1])


def test_decode_speed_counts_from_the_first_token() -> None:
    assert decode_speed([sample(5.0, 5.1, 5.2), sample(1.0, 1.2, 1.4)]) == pytest.approx(4 / 0.6)
    assert decode_speed([sample(5.0, 5.00001)]) == 0  # too short to tell


def test_goodput_counts_complete_answers_within_both_limits() -> None:
    target = LatencyTarget(ttft_s=1.0, gap_s=0.2)
    good = sample(0.9, 1.0, 1.1)
    late = sample(1.1, 1.2, 1.3)
    slow = sample(0.5, 1.0, 1.5)
    hiccup = sample(0.5, 0.9, 0.91, 0.92, 0.93)  # on average fast enough
    cut = sample(0.5, 0.6, ended=False)

    assert goodput([good, late, slow, hiccup, cut], target, seconds=4.0) == 0.5
    assert goodput([sample(10.9, 11.0, due_s=10.0)], target, seconds=1.0) == 1.0  # measured from its due time


def test_capacity_counts_until_the_first_client_has_no_request_left() -> None:
    first = [sample(1.0, 2.0), sample(3.0, 4.0)]  # done at 4 s: two requests
    second = [sample(1.0, 2.0, client=1), sample(4.0, 8.0, client=1)]  # one and a half by then

    assert capacity(Outcome([*first, *second], wall_s=8.0)) == 3.5 / 4.0


def test_without_an_answer_there_is_no_capacity() -> None:
    assert capacity(Outcome([Sample(0, "", 0.0, error="no")], wall_s=1.0)) == 0.0


def test_disturbance_is_that_of_gaps_during_the_prefill_of_long_prompts() -> None:
    row = sample(*[i / 10 for i in range(1, 31)], 4.0, 4.1, kind=RUNNING, ended=False)  # a gap of 1 s from 3.0 on
    quiet = sample(1.0, 2.0, kind=QUIET)
    long = sample(3.9, due_s=3.05, kind=LONG)

    found = disturbance(Outcome([row, quiet, long], wall_s=5.0))

    assert found["quiet_gap_p50_s"] == pytest.approx(0.1)
    assert found["disturbed_gap_p99_s"] == pytest.approx(1.0)
    assert found["disturbance"] == pytest.approx(10.0)
    assert found["long_ttft_p50_s"] == pytest.approx(0.85)


def test_without_running_rows_disturbance_is_not_measured() -> None:
    with pytest.raises(NotMeasured, match="no gaps"):
        disturbance(Outcome([sample(1.0, 2.0, kind=QUIET), sample(3.0, kind=LONG)], wall_s=5.0))


def test_plans_and_outcomes_pass_through_json() -> None:
    plan = Plan([Client([ChatRequest([{"role": "user", "content": "é"}], 3, 0.5, "x", batch=True)], background=True)])
    outcome = Outcome([sample(1.0, 2.0), Sample(1, "x", 0.0, error="gone")], wall_s=2.0)

    assert Plan.from_json(json.loads(json.dumps(asdict(plan)))) == plan
    assert Outcome.from_json(json.loads(json.dumps(asdict(outcome)))) == outcome
