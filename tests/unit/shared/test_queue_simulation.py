"""Estimated starts and waiting times under simulated load, with the real scripts."""

from __future__ import annotations

import pytest

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from shared.redis.client import Redis
from tests.support.queue_simulation import Simulation, Source, Waited, quantile

SLOTS = 8


def ratios(jobs: list[Waited], owner: str) -> list[float]:
    """Return predicted by actual waiting times of an owner's jobs, without the first ones and short waits."""
    own = [each for each in jobs if each.source.owner == owner]
    settled = own[len(own) // 4 :]
    return [each.predicted_s / each.waited_s for each in settled if each.predicted_s and each.waited_s > 1]


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "sources",
    [
        pytest.param([Source("a", 7), Source("b", 4)], id="one of two keys has more than its share"),
        pytest.param([Source("a", 10)], id="one key has more than the capacity", marks=LONG),
        pytest.param([Source("a", 8, limits=OwnerLimits(weight=3)), Source("b", 8)], id="weights", marks=LONG),
        pytest.param([Source("c", 4), Source("a", 6, priority=Priority.BATCH)], id="batch below others", marks=LONG),
        pytest.param([Source("a", 4, limits=OwnerLimits(max_running=2)), Source("b", 3)], id="limit", marks=LONG),
    ],
)
def test_estimated_starts_are_right_within_a_factor_of_two(
    valkey_client: Redis, monkeypatch: pytest.MonkeyPatch, sources: list[Source]
) -> None:
    jobs = Simulation(valkey_client, monkeypatch, slots=SLOTS).run(sources, 40)
    found = ratios(jobs, "a")
    assert len(found) > 50
    assert 0.5 < quantile(found, 0.05) <= quantile(found, 0.95) < 2


@LONG
def test_estimated_starts_of_a_key_with_less_than_its_share_are_right_on_average(
    valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs wait for one or two others, whose ends are random. So single estimates cannot be right."""
    jobs = Simulation(valkey_client, monkeypatch, slots=SLOTS).run([Source("a", 8), Source("b", 2)], 60)
    own = [each for each in jobs if each.source.owner == "b" and each.predicted_s and each.waited_s > 0.1]
    assert len(own) > 50
    predicted_s, waited_s = (sum(getattr(each, name) or 0.0 for each in own) for name in ("predicted_s", "waited_s"))
    assert 0.8 < predicted_s / waited_s < 1.25


@LONG
def test_reserved_rows_shorten_the_wait_of_interactive_jobs(
    valkey_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 120 % of capacity, half of it batch jobs."""
    slots, waits = 32, []
    for reserve in (0, slots // 16):
        sources = [Source("a", slots * 0.6), Source("b", slots * 0.6, priority=Priority.BATCH)]
        valkey_client.flushall()
        jobs = Simulation(valkey_client, monkeypatch, slots=slots, reserve=reserve).run(sources, 40)
        waits.append(quantile([each.waited_s for each in jobs if each.source.owner == "a"], 0.99))
    assert waits[1] < 0.75 * waits[0]
