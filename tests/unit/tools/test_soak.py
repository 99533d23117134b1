"""A soak notices growth and jobs without an end, ignores noise, and lets some processes live until the end."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from shared.redis import keys
from tests.chaos.faults import FaultKind
from tests.soak import plan
from tests.soak.chart import svg
from tests.soak.fit import HOUR_S, Limit, fit
from tests.soak.sampler import CLIENTS, Instance, ProcessSample, RedisSample, Samples, pattern_of
from tests.soak.verdicts import IDLE_SLACK, LIMITS, JobCount, judge, left_open

MINUTES = 60.0


def samples_of(memory: Callable[[float], float], role: str = "api", to_s: float = MINUTES * 60) -> Samples:
    """Samples of one process, every 10 s."""
    times = [float(second) for second in range(0, int(to_s) + 1, 10)]
    taken = [ProcessSample(at_s, memory(at_s), 20, 5, at_s / 2) for at_s in times]
    return Samples(
        processes={Instance(role, 0.0, 1): taken},
        redis=[RedisSample(at_s, 10 + at_s / HOUR_S * 20, at_s / HOUR_S * 20, {keys.JOB: 3}) for at_s in times],
    )


def grown(samples: Samples) -> list[str]:
    return list(judge(samples, 0.0, MINUTES).growth())


def test_steady_growth_after_the_warm_up_is_reported() -> None:
    (line,) = grown(samples_of(lambda at_s: 100 + 2 * LIMITS["rss_mb"].amount * at_s / HOUR_S))
    assert line.startswith("api (pid 1): rss_mb grows by 20.0 per hour")


def test_growth_during_the_warm_up_noise_and_single_peaks_are_flat() -> None:
    rng = random.Random(1)
    assert not grown(samples_of(lambda at_s: min(100 + at_s, 700) + rng.uniform(-5, 5)))
    assert not grown(samples_of(lambda at_s: 500.0 if at_s > 3300 else 100.0))


def test_large_processes_may_vary_by_a_share() -> None:
    assert not grown(samples_of(lambda at_s: 1000 + 20 * at_s / HOUR_S))


def test_a_process_that_lived_too_short_gets_no_verdict() -> None:
    found = judge(samples_of(lambda at_s: 100 + at_s, to_s=1200), 0.0, MINUTES)
    (process,) = found.processes
    assert not process.fits["rss_mb"].judged
    assert not list(found.growth())


def test_the_clients_are_not_judged() -> None:
    assert judge(samples_of(lambda at_s: 100 + at_s, CLIENTS), 0.0, MINUTES).processes == []


def test_records_that_redis_keeps_by_design_do_not_count() -> None:
    redis = judge(samples_of(lambda _: 100.0), 0.0, MINUTES).redis
    assert redis is not None
    assert redis.per_hour == pytest.approx(0)


def test_a_fit_needs_two_samples() -> None:
    assert fit([(0.0, 1.0)], Limit(1), 0) is None


def test_descriptors_that_stay_open_are_reported_by_role() -> None:
    before = {"api": ProcessSample(0, 100, 20, 5, 0)}
    slack = IDLE_SLACK["descriptors"]
    assert not list(left_open(before, {"api": ProcessSample(9, 100, 20 + slack, 5, 0), "new": before["api"]}))
    (line,) = left_open(before, {"api": ProcessSample(9, 100, 21 + slack, 5, 0)})
    assert line == f"api: {21 + slack} descriptors when idle, 20 before the run"


def test_every_job_has_one_end() -> None:
    assert JobCount(seen=5, batch_lines=2, ended=7).once_each
    assert not JobCount(seen=5, batch_lines=2, ended=8).once_each
    assert not JobCount(seen=5, batch_lines=2, ended=6).once_each


def test_only_replaceable_processes_are_killed_until_the_end() -> None:
    faults = plan.schedule(seed=1, minutes=MINUTES)
    assert faults == plan.schedule(seed=1, minutes=MINUTES)
    assert {fault.kind for fault in faults} == set(FaultKind) - {FaultKind.DISK_FILLED}
    kills = (FaultKind.WORKER_KILLED, FaultKind.WORKER_STOPPED, FaultKind.API_KILLED)
    assert {fault.target for fault in faults if fault.kind in kills} == {1}
    single = (FaultKind.REDIS_KILLED, FaultKind.BACKGROUND_KILLED)
    assert max(fault.at_s for fault in faults if fault.kind in single) <= plan.EARLY * MINUTES * 60


def test_keys_are_counted_by_pattern() -> None:
    assert pattern_of(keys.BATCHES + "k1") == keys.BATCHES
    assert pattern_of(keys.BATCH + "b1") == keys.BATCH
    assert pattern_of("something else") == "something else"


def test_the_chart_has_a_line_for_each_process() -> None:
    samples = samples_of(lambda _: 100.0, to_s=100)
    samples.processes[Instance("api", 50.0, 2)] = samples.processes[Instance("api", 0.0, 1)]
    text = svg(samples, "a machine")
    assert "a machine" in text
    assert text.count(">api<") == 1
    assert svg(samples, "a machine") == text
