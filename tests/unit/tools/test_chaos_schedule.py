"""When what breaks: drawn from the seed, and enough of everything."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.faults import LONGEST_S, Kind, schedule
from tests.chaos.fleet import LEASE_S, WORKERS


def test_a_seed_is_a_schedule() -> None:
    assert schedule(7, 5) == schedule(7, 5)
    assert schedule(7, 5) != schedule(8, 5)


@pytest.mark.parametrize("seed", range(20))
def test_half_an_hour_has_sixty_killed_workers_and_ten_killed_servers(seed: int) -> None:
    counts = Counter(strike.kind for strike in schedule(seed, 30))
    assert counts[Kind.WORKER_KILLED] >= 60
    assert counts[Kind.REDIS_KILLED] >= 10


@pytest.mark.parametrize("seed", range(20))
def test_a_short_run_has_each_kind_and_keeps_to_its_time(seed: int) -> None:
    strikes = schedule(seed, 2)
    assert {strike.kind for strike in strikes} == set(Kind)
    assert [strike.at_s for strike in strikes] == sorted(strike.at_s for strike in strikes)
    assert strikes[0].at_s > 0 and strikes[-1].at_s < 120
    assert all(0 <= strike.target < WORKERS and 0 < strike.lasts_s <= LONGEST_S for strike in strikes)


def test_faults_last_shorter_and_longer_than_a_lease() -> None:
    lengths = [strike.lasts_s for strike in schedule(1, 30)]
    assert min(lengths) < LEASE_S < max(lengths)


def test_what_a_machine_cannot_do_is_left_out() -> None:
    assert Kind.DISK_FILLED not in {strike.kind for strike in schedule(1, 5, set(Kind) - {Kind.DISK_FILLED})}
