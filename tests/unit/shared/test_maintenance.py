"""Maintenance loop: jobs are recovered even if the broker or a part of the round fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import redis

from shared.jobs.record import EndedJob, Status
from shared.jobs.store import Jobs
from shared.queue import maintenance
from shared.queue.maintenance import Maintenance
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import lapse, lease, make_reaper, started, submit


class FakeQueue:
    """A fake reaper, notifier and job store in one, which records calls and can fail like an unreachable Redis."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.remaining = 0
        self.ends: list[EndedJob] = []
        self.rest_s = 0.01

    def reap(self) -> list[str]:
        self.calls.append("reap")
        if self.error is not None:
            raise self.error
        return ["m"]

    def wake(self, models: Iterable[str]) -> None:
        self.calls.append(f"wake {' '.join(models)}")

    def adopt_old_layout(self) -> int:
        self.calls.append("adopt")
        return self.remaining

    def drop_old_layout(self) -> None:
        self.calls.append("drop")

    def take_ends(self) -> list[EndedJob]:
        ends, self.ends = self.ends, []
        return ends

    def also(self) -> None:
        self.calls.append("also")


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


def make(queue: FakeQueue, **options: Any) -> Maintenance:
    return Maintenance(queue, queue, queue, queue.also, **options)  # type: ignore[arg-type]


def test_round_reaps_wakes_and_adopts(queue: FakeQueue) -> None:
    make(queue).round()
    assert queue.calls == ["reap", "wake m", "adopt", "drop", "also"]


@pytest.mark.parametrize(
    "error", [redis.ConnectionError("unreachable"), redis.ResponseError("WRONGTYPE"), RuntimeError("bug")]
)
def test_failed_round_is_followed_by_a_complete_one(
    queue: FakeQueue, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    loop = make(queue)
    queue.error = error
    for _ in range(3):
        loop.round()
    assert len(caplog.records) == (1 if isinstance(error, redis.ConnectionError) else 3)
    queue.error = None
    loop.round()
    assert queue.calls == ["reap"] * 4 + ["wake m", "adopt", "drop", "also"]


def test_old_jobs_are_searched_at_intervals_until_none_remains(
    queue: FakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, queue.remaining = make(queue), 2
    for _ in range(3):
        loop.round()
    assert (queue.calls.count("adopt"), queue.calls.count("drop")) == (1, 0)
    later = maintenance.time.monotonic() + maintenance.ADOPT_AGAIN_S
    monkeypatch.setattr(maintenance.time, "monotonic", lambda: later)
    queue.remaining = 0
    loop.round()
    later += 10 * maintenance.ADOPT_AGAIN_S
    loop.round()
    assert (queue.calls.count("adopt"), queue.calls.count("drop")) == (2, 1)


def test_jobs_that_ended_without_a_worker_are_reported_only_with_a_callback(queue: FakeQueue) -> None:
    ended = EndedJob("job_1", "m", Status.CANCELLED)
    queue.ends, reported = [ended], list[EndedJob]()
    make(queue).round()
    assert queue.ends == [ended]
    make(queue, on_ended=reported.append).round()
    assert reported == [ended] and queue.ends == []


def test_rounds_repeat_in_the_background_until_stopped(queue: FakeQueue, eventually: Callable[..., None]) -> None:
    loop = make(queue)
    loop.start()
    eventually(lambda: queue.calls.count("reap") > 3)
    loop.stop()


def test_jobs_of_a_dead_worker_are_recovered_and_workers_woken(
    client: Redis, settings: Settings, queue: FakeQueue
) -> None:
    jobs = Jobs(client, settings)
    job = submit(jobs)
    started(lease(client, "w1"))
    loop = Maintenance(make_reaper(client), queue, jobs)  # type: ignore[arg-type]
    loop.round()
    assert queue.calls == ["wake "]
    lapse(client, "w1")
    loop.round()
    assert queue.calls == ["wake ", "wake m"]
    assert jobs.get(job.id, "a").status is Status.QUEUED and not client.exists(keys.RUNNING + "w1")
