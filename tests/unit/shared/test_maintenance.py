"""The round that every process makes: recovering jobs depends neither on the broker nor on one failing part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import redis

from shared.jobs.record import EndedJob, Status
from shared.jobs.store import Jobs
from shared.queue import keys, maintenance
from shared.queue.maintenance import Maintenance
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.queueing import lapse, lease, make_reaper, started, submit


class Stage:
    """Reaper, notifier and jobs in one; Redis may be away, and what is done is noted."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.error: Exception | None = None
        self.left = 0
        self.ends: list[EndedJob] = []
        self.rest_s = 0.01

    def reap(self) -> list[str]:
        self.done.append("reap")
        if self.error is not None:
            raise self.error
        return ["m"]

    def wake(self, models: Iterable[str]) -> None:
        self.done.append(f"wake {' '.join(models)}")

    def adopt_old_layout(self) -> int:
        self.done.append("adopt")
        return self.left

    def drop_old_layout(self) -> None:
        self.done.append("drop")

    def take_ends(self) -> list[EndedJob]:
        ends, self.ends = self.ends, []
        return ends

    def also(self) -> None:
        self.done.append("also")


@pytest.fixture
def stage() -> Stage:
    return Stage()


def make(stage: Stage, **more: Any) -> Maintenance:
    return Maintenance(stage, stage, stage, stage.also, **more)  # type: ignore[arg-type]


def test_a_round_reaps_wakes_and_adopts(stage: Stage) -> None:
    make(stage).round()
    assert stage.done == ["reap", "wake m", "adopt", "drop", "also"]


@pytest.mark.parametrize(
    "error", [redis.ConnectionError("away"), redis.ResponseError("WRONGTYPE"), RuntimeError("bug")]
)
def test_a_round_that_fails_is_followed_by_a_whole_one(
    stage: Stage, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = make(stage)
    stage.error = error
    for _ in range(3):
        rounds.round()
    assert len(caplog.records) == (1 if isinstance(error, redis.ConnectionError) else 3)
    stage.error = None
    rounds.round()
    assert stage.done == ["reap"] * 4 + ["wake m", "adopt", "drop", "also"]


def test_it_searches_for_old_jobs_until_none_is_left_and_not_in_each_round(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, stage.left = make(stage), 2
    for _ in range(3):
        rounds.round()
    assert (stage.done.count("adopt"), stage.done.count("drop")) == (1, 0)
    later = maintenance.time.monotonic() + maintenance.ADOPT_AGAIN_S
    monkeypatch.setattr(maintenance.time, "monotonic", lambda: later)
    stage.left = 0
    rounds.round()
    later += 10 * maintenance.ADOPT_AGAIN_S
    rounds.round()
    assert (stage.done.count("adopt"), stage.done.count("drop")) == (2, 1)


def test_ends_that_no_worker_knows_of_are_reported_where_that_is_asked_for(stage: Stage) -> None:
    ended = EndedJob("job_1", "m", Status.CANCELLED)
    stage.ends, reported = [ended], list[EndedJob]()
    make(stage).round()
    assert stage.ends == [ended]
    make(stage, on_ended=reported.append).round()
    assert reported == [ended] and stage.ends == []


def test_it_goes_on_in_the_background_until_stopped(stage: Stage, eventually: Callable[..., None]) -> None:
    rounds = make(stage)
    rounds.start()
    eventually(lambda: stage.done.count("reap") > 3)
    rounds.stop()


def test_the_jobs_of_a_dead_worker_are_recovered_and_others_woken(
    client: Redis, settings: Settings, stage: Stage
) -> None:
    jobs = Jobs(client, settings)
    job = submit(jobs)
    started(lease(client, "w1"))
    rounds = Maintenance(make_reaper(client), stage, jobs)  # type: ignore[arg-type]
    rounds.round()
    assert stage.done == ["wake "]
    lapse(client, "w1")
    rounds.round()
    assert stage.done == ["wake ", "wake m"]
    assert jobs.get(job.id, "a").status is Status.QUEUED and not client.exists(keys.RUNNING + "w1")
