"""The lease renewer, one round at a time."""

from __future__ import annotations

from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from redis import ResponseError

from shared.jobs.record import Job, Status
from shared.jobs.store import Jobs
from shared.queue.claims import ClaimedJob, Claims, NoLease, WriteResult
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.queueing import lapse, lease, reap, reserved, row, submit, taken
from worker.queue.lease import HostAnnouncer, LeaseRenewer


class Harness:
    """A lease renewer, the claims of its worker, and its calls."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.claims = Claims(client, "w1")
        self.write_results: list[tuple[str, int, WriteResult]] = []
        self.held: dict[str, ClaimedJob] = {}
        self.announced: list[bool] = []
        self.deaths: list[str] = []
        self.let_lapse = False
        self.renewer = LeaseRenewer(
            self.claims,
            lambda *write_result: self.write_results.append(write_result),
            lambda: dict(self.held),
            self.announced.append,
            60,
            lambda: self.let_lapse,
            self.deaths.append,
        )

    def claim(self, *, known: bool = True, start: bool = True) -> ClaimedJob:
        submit(self.jobs)
        claimed = taken(self.claims)
        if start:
            self.claims.append([row(claimed, start=True)])
        if known:
            self.held[claimed.job.id] = claimed
        return claimed

    def status(self, claimed: ClaimedJob) -> Status:
        return self.get(claimed).status

    def get(self, claimed: ClaimedJob) -> Job:
        return self.jobs.get(claimed.job.id, "a")

    def holder(self, claimed: ClaimedJob) -> str:
        return str(self.client.hget(keys.JOB + claimed.job.id, "worker"))


@pytest.fixture
def harness(client: Redis, settings: Settings) -> Harness:
    return Harness(client, settings)


def test_a_round_renews_and_announces(harness: Harness) -> None:
    with pytest.raises(NoLease):
        reserved(harness.claims)
    harness.renewer.round()
    harness.renewer.round()
    assert reserved(harness.claims) == []
    assert harness.announced == [True, False]


def test_a_cancelled_job_is_reported_to_the_engine(harness: Harness) -> None:
    harness.renewer.round()
    claimed = harness.claim()
    harness.jobs.stop(claimed.job.id, "a")
    harness.renewer.round()
    assert harness.write_results == [(claimed.job.id, 1, WriteResult.CANCELLED)]


@pytest.mark.parametrize("start", [True, False], ids=["running", "reserved"])
def test_a_claim_whose_answer_was_lost_is_released_after_two_rounds(harness: Harness, start: bool) -> None:
    harness.renewer.round()
    known, lost = harness.claim(start=start), harness.claim(known=False, start=start)
    harness.renewer.round()
    assert harness.holder(lost) == "w1"
    harness.renewer.round()
    assert (harness.holder(lost), harness.holder(known)) == ("", "w1")
    assert harness.get(lost).status is Status.QUEUED and harness.get(lost).attempt == int(start)


def test_a_claim_that_becomes_known_in_time_is_kept(harness: Harness) -> None:
    harness.renewer.round()
    claimed = harness.claim(known=False)
    harness.renewer.round()
    harness.held[claimed.job.id] = claimed
    harness.renewer.round()
    harness.renewer.round()
    assert harness.status(claimed) is Status.RUNNING


def test_a_job_that_was_claimed_again_is_not_released_for_its_first_claim(harness: Harness) -> None:
    harness.renewer.round()
    first = harness.claim(known=False, start=False)
    harness.renewer.round()
    harness.claims.release([(first.job.id, first.job.claimed_at)])
    again = taken(harness.claims)
    harness.held[again.job.id] = again
    harness.renewer.round()
    harness.renewer.round()
    assert harness.holder(again) == "w1"


def test_jobs_that_others_may_have_taken_after_a_lapse_are_fenced(harness: Harness) -> None:
    harness.renewer.round()
    running, waiting = harness.claim(), harness.claim(start=False)
    lapse(harness.client, "w1")
    reap(harness.client)
    harness.renewer.round()
    assert harness.write_results == [(each.job.id, 1, WriteResult.FENCED) for each in (running, waiting)]
    assert harness.announced == [True, True]


def test_a_lapse_that_no_process_noticed_changes_nothing(harness: Harness) -> None:
    harness.renewer.round()
    running, waiting = harness.claim(), harness.claim(start=False)
    lapse(harness.client, "w1")
    harness.renewer.round()
    assert harness.write_results == []
    assert (harness.status(running), harness.holder(waiting)) == (Status.RUNNING, "w1")


def test_a_reserved_job_that_another_worker_took_is_not_released(harness: Harness) -> None:
    harness.renewer.round()
    waiting = harness.claim(start=False)
    lapse(harness.client, "w1")
    (moved,) = reserved(lease(harness.client, "w2"))
    harness.renewer.round()
    harness.renewer.round()
    assert moved.job.id == waiting.job.id and harness.holder(moved) == "w2"


def test_it_continues_while_redis_is_unreachable(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(seconds: float) -> None:
        raise RedisAway

    with monkeypatch.context() as patch:
        patch.setattr(harness.claims, "renew", unreachable)
        harness.renewer.round()
        harness.renewer.round()
    harness.renewer.round()
    assert (harness.announced, harness.deaths) == ([True], [])
    assert caplog.text.count("redis_unreachable") == 1


def test_a_renewal_that_cannot_succeed_ends_the_process(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ResponseError("ERR user_script:12: attempt to index a nil value")

    monkeypatch.setattr(harness.claims, "renew", fail)
    harness.renewer.start()
    harness.renewer.join(5)
    assert harness.deaths == ["its lease thread died (ResponseError)"]


def test_a_process_that_cannot_continue_lets_its_lease_lapse(harness: Harness) -> None:
    harness.renewer.round()
    renewed = harness.client.zscore(keys.LEASES, "w1")
    harness.let_lapse = True
    harness.renewer.round()
    assert (harness.client.zscore(keys.LEASES, "w1"), harness.announced) == (renewed, [True])


def test_hurry_starts_a_round_at_once(harness: Harness, eventually: Any) -> None:
    harness.renewer.start()
    eventually(lambda: len(harness.announced) == 1)
    harness.renewer.hurry()
    eventually(lambda: len(harness.announced) == 2)
    harness.renewer.stop()
    assert not harness.renewer.is_alive() and harness.deaths == []


def test_the_host_is_announced_periodically_also_after_an_error(eventually: Any) -> None:
    calls: list[None] = []

    def announce() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RedisAway

    deaths: list[str] = []
    announcer = HostAnnouncer(announce, 0.003, deaths.append)
    announcer.start()
    eventually(lambda: len(calls) > 4)
    announcer.stop()
    assert deaths == []
