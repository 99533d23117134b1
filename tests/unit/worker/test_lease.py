"""The lease keeper, round by round."""

from __future__ import annotations

from typing import Any

import pytest
from redis import ConnectionError as RedisAway
from redis import ResponseError

from shared.jobs.record import Job, Status
from shared.jobs.store import Jobs
from shared.queue import keys
from shared.queue.claims import ClaimedJob, Claims, NoLease, WriteResult
from shared.queue.redis import Redis
from shared.settings import Settings
from tests.support.queueing import lapse, lease, reap, reserved, row, submit, taken
from worker.queue.lease import HostAnnouncer, LeaseRenewer


class Desk:
    """A keeper, the claims it keeps, and what it did."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        self.client = client
        self.jobs = Jobs(client, settings)
        self.claims = Claims(client, "w1")
        self.write_results: list[tuple[str, int, WriteResult]] = []
        self.held: dict[str, ClaimedJob] = {}
        self.announced: list[bool] = []
        self.deaths: list[str] = []
        self.given_up = False
        self.keeper = LeaseRenewer(
            self.claims,
            lambda *write_result: self.write_results.append(write_result),
            lambda: dict(self.held),
            self.announced.append,
            60,
            lambda: self.given_up,
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
def desk(client: Redis, settings: Settings) -> Desk:
    return Desk(client, settings)


def test_a_round_renews_and_announces(desk: Desk) -> None:
    with pytest.raises(NoLease):
        reserved(desk.claims)
    desk.keeper.round()
    desk.keeper.round()
    assert reserved(desk.claims) == []
    assert desk.announced == [True, False]


def test_a_stop_word_reaches_the_engine(desk: Desk) -> None:
    desk.keeper.round()
    claimed = desk.claim()
    desk.jobs.stop(claimed.job.id, "a")
    desk.keeper.round()
    assert desk.write_results == [(claimed.job.id, 1, WriteResult.CANCELLED)]


@pytest.mark.parametrize("start", [True, False], ids=["running", "reserved"])
def test_a_claim_whose_answer_was_lost_goes_back_after_two_rounds(desk: Desk, start: bool) -> None:
    desk.keeper.round()
    known, lost = desk.claim(start=start), desk.claim(known=False, start=start)
    desk.keeper.round()
    assert desk.holder(lost) == "w1"
    desk.keeper.round()
    assert (desk.holder(lost), desk.holder(known)) == ("", "w1")
    assert desk.get(lost).status is Status.QUEUED and desk.get(lost).attempt == int(start)


def test_a_claim_that_becomes_known_in_time_stays(desk: Desk) -> None:
    desk.keeper.round()
    claimed = desk.claim(known=False)
    desk.keeper.round()
    desk.held[claimed.job.id] = claimed
    desk.keeper.round()
    desk.keeper.round()
    assert desk.status(claimed) is Status.RUNNING


def test_a_job_that_is_claimed_again_meanwhile_is_not_given_back_for_the_first_claim(desk: Desk) -> None:
    desk.keeper.round()
    first = desk.claim(known=False, start=False)
    desk.keeper.round()
    desk.claims.release([(first.job.id, first.job.claimed_at)])
    again = taken(desk.claims)
    desk.held[again.job.id] = again
    desk.keeper.round()
    desk.keeper.round()
    assert desk.holder(again) == "w1"


def test_after_a_lapse_the_jobs_that_others_may_have_are_dropped(desk: Desk) -> None:
    desk.keeper.round()
    running, waiting = desk.claim(), desk.claim(start=False)
    lapse(desk.client, "w1")
    reap(desk.client)
    desk.keeper.round()
    assert desk.write_results == [(each.job.id, 1, WriteResult.FENCED) for each in (running, waiting)]
    assert desk.announced == [True, True]


def test_a_lapse_that_nobody_noticed_costs_nothing(desk: Desk) -> None:
    desk.keeper.round()
    running, waiting = desk.claim(), desk.claim(start=False)
    lapse(desk.client, "w1")
    desk.keeper.round()
    assert desk.write_results == []
    assert (desk.status(running), desk.holder(waiting)) == (Status.RUNNING, "w1")


def test_a_reserved_job_that_another_took_meanwhile_is_not_given_back(desk: Desk) -> None:
    desk.keeper.round()
    waiting = desk.claim(start=False)
    lapse(desk.client, "w1")
    (moved,) = reserved(lease(desk.client, "w2"))
    desk.keeper.round()
    desk.keeper.round()
    assert moved.job.id == waiting.job.id and desk.holder(moved) == "w2"


def test_redis_may_be_away(desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def away(seconds: float) -> None:
        raise RedisAway

    with monkeypatch.context() as patch:
        patch.setattr(desk.claims, "renew", away)
        desk.keeper.round()
        desk.keeper.round()
    desk.keeper.round()
    assert (desk.announced, desk.deaths) == ([True], [])
    assert caplog.text.count("redis_away") == 1


def test_a_renewal_that_is_at_fault_ends_the_process(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_fault(*_: Any) -> None:
        raise ResponseError("ERR user_script:12: attempt to index a nil value")

    monkeypatch.setattr(desk.claims, "renew", at_fault)
    desk.keeper.start()
    desk.keeper.join(5)
    assert desk.deaths == ["its lease thread died (ResponseError)"]


def test_a_process_that_cannot_continue_lets_its_lease_lapse(desk: Desk) -> None:
    desk.keeper.round()
    renewed = desk.client.zscore(keys.LEASES, "w1")
    desk.given_up = True
    desk.keeper.round()
    assert (desk.client.zscore(keys.LEASES, "w1"), desk.announced) == (renewed, [True])


def test_it_renews_at_once_when_asked_to(desk: Desk, eventually: Any) -> None:
    desk.keeper.start()
    eventually(lambda: len(desk.announced) == 1)
    desk.keeper.hurry()
    eventually(lambda: len(desk.announced) == 2)
    desk.keeper.stop()
    assert not desk.keeper.is_alive() and desk.deaths == []


def test_the_host_is_announced_again_and_again_whatever_redis_does(eventually: Any) -> None:
    calls: list[None] = []

    def announce() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise RedisAway

    deaths: list[str] = []
    keeper = HostAnnouncer(announce, 0.003, deaths.append)
    keeper.start()
    eventually(lambda: len(calls) > 4)
    keeper.stop()
    assert deaths == []
