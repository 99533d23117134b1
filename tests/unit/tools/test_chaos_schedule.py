"""The schedule of faults depends only on the seed and contains every kind."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.faults import MAX_DURATION_S, FaultKind, schedule
from tests.chaos.stack import LEASE_S, WORKERS


def test_the_same_seed_gives_the_same_schedule() -> None:
    assert schedule(7, 5) == schedule(7, 5)
    assert schedule(7, 5) != schedule(8, 5)


@pytest.mark.parametrize("seed", range(20))
def test_half_an_hour_has_sixty_worker_kills_and_ten_redis_kills(seed: int) -> None:
    counts = Counter(fault.kind for fault in schedule(seed, 30))
    assert counts[FaultKind.WORKER_KILLED] >= 60
    assert counts[FaultKind.REDIS_KILLED] >= 10


@pytest.mark.parametrize("seed", range(20))
def test_a_short_run_has_every_kind_within_its_duration(seed: int) -> None:
    faults = schedule(seed, 2)
    assert {fault.kind for fault in faults} == set(FaultKind)
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    assert faults[0].at_s > 0 and faults[-1].at_s < 120
    assert all(0 <= fault.target < WORKERS and 0 < fault.duration_s <= MAX_DURATION_S for fault in faults)


def test_some_faults_are_shorter_and_some_longer_than_a_lease() -> None:
    durations = [fault.duration_s for fault in schedule(1, 30)]
    assert min(durations) < LEASE_S < max(durations)


def test_unsupported_kinds_are_left_out() -> None:
    assert FaultKind.DISK_FILLED not in {
        fault.kind for fault in schedule(1, 5, set(FaultKind) - {FaultKind.DISK_FILLED})
    }
